"""What a ledger counts: samples over its whole life, which are on disk, and the unfinished samples of each client.

Invariant: a counter on disk changes in the transaction of the rows that it counts; in memory it changes after that
transaction has ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ...errors import StorageError
from .ledger_file import COUNTERS, OPEN, LedgerFile


@dataclass(slots=True)
class Counters:
    """Samples over the ledger's whole life. `duplicates`, `stale`: outputs that were dropped. `kept`: settled requests
    it holds."""

    requested: int = 0
    unique: int = 0
    failed: int = 0
    acknowledged: int = 0
    duplicates: int = 0
    stale: int = 0
    kept: int = 0

    @property
    def missing(self) -> int:
        """Requested samples that have neither arrived nor failed."""
        return self.requested - self.unique - self.failed


@dataclass(slots=True)
class Change(Counters):
    """What one transaction adds. `unfinished`: per client, samples that were recorded as wanted, less those that ended."""

    unfinished: Counter[str] = field(default_factory=Counter)


class Totals:
    """The counters of one ledger file. `unfinished`: per client, samples of open requests that are still to come."""

    def __init__(self, file: LedgerFile) -> None:
        self._file = file
        row = file.run("SELECT * FROM counters WHERE id=1").fetchone()
        if row is None or not all(type(value) is int for value in row):
            raise StorageError(f"ledger {file.path}: its counters are damaged; restore it from a copy or name a new file")
        self.counters = Counters(*row[1:])
        self.unfinished: Counter[str] = Counter()
        for client, samples in file.run(f"SELECT client, samples-recorded FROM requests WHERE {OPEN}"):
            self.unfinished[client] += samples

    @contextmanager
    def changing(self, durable: bool = True) -> Iterator[Change]:
        """A transaction (`LedgerFile.transaction`). What the block adds to the yielded change is added to the totals."""
        new = Change()
        with self._file.transaction(durable):
            yield new
            added = [getattr(new, name) for name in COUNTERS]
            if any(added):
                changes = ", ".join(f"[{name}]=[{name}]+?" for name in COUNTERS)
                self._file.run(f"UPDATE counters SET {changes} WHERE id=1", added)
        for name in COUNTERS:
            setattr(self.counters, name, getattr(self.counters, name) + getattr(new, name))
        for client, samples in new.unfinished.items():
            self.unfinished[client] += samples
            if not self.unfinished[client]:
                del self.unfinished[client]
