"""Which open requests of a ledger an abort means."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from .ledger_file import LEASED, OPEN, PAUSED, QUEUED, LedgerFile

MOST_REQUESTS, MOST_SAMPLES = 256, 4096
"""Most requests, and about the most samples, of one transaction. Clients that come meanwhile wait for it."""


@dataclass(frozen=True)
class Aborted:
    """The requests that were open when an abort came. `request_ids`: their ids, or None for all up to row `upto` of the
    ledger."""

    request_ids: Collection[str] | None
    upto: int


def newest(file: LedgerFile) -> int:
    """The row of the newest request."""
    return int(file.value("SELECT COALESCE(MAX(seq), 0) FROM requests"))


def queued(file: LedgerFile, aborted: Aborted) -> list[tuple[str, tuple[Any, ...]]]:
    """Client and row (id, samples, digest, payload) of requests that no engine has, as many as one transaction takes. Those of
    clients that are gone are among them."""
    found = list[tuple[str, tuple[Any, ...]]]()
    samples = 0
    for client, *row in _rows(file, aborted, (QUEUED, PAUSED), "client, id, samples, digest, payload", MOST_REQUESTS):
        found.append((client, tuple(row)))
        samples += row[1] if isinstance(row[1], int) else 0  # a damaged row is found when it is read
        if len(found) >= MOST_REQUESTS or samples >= MOST_SAMPLES:
            break
    return found


def any_open(file: LedgerFile, aborted: Aborted) -> bool:
    """Whether one of the requests is unfinished."""
    return bool(_rows(file, aborted, (QUEUED, PAUSED, LEASED), "1", 1))


def any_leased(file: LedgerFile) -> bool:
    """Whether a request is leased."""
    return file.run(f"SELECT 1 FROM requests WHERE state={LEASED} AND {OPEN} LIMIT 1").fetchone() is not None


def _rows(file: LedgerFile, aborted: Aborted, states: Sequence[int], columns: str, most: int) -> list[tuple[Any, ...]]:
    """Columns of at most `most` of the requests that are in one of these states."""
    if aborted.request_ids is not None:
        names = list(aborted.request_ids)
        # The rows are found by their ids: with `+` the state is no reason to read all open requests.
        return file.run(f"SELECT {columns} FROM requests WHERE id IN ({_marks(names)}) AND +state IN ({_marks(states)}) "
                        "AND seq<=? LIMIT ?", (*names, *states, aborted.upto, most)).fetchall()
    found = list[tuple[Any, ...]]()
    for state in states:
        if len(found) < most:
            found += file.run(f"SELECT {columns} FROM requests WHERE state=? AND {OPEN} AND seq<=? ORDER BY seq LIMIT ?",
                              (state, aborted.upto, most - len(found))).fetchall()
    return found


def _marks(values: Sequence[object]) -> str:
    return ",".join("?" * len(values))
