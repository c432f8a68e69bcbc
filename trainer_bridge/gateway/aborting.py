"""Which open requests of a ledger an abort means."""

from __future__ import annotations

from collections.abc import Collection
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
    for client, *row in [row for state in (QUEUED, PAUSED) for row in
                         _rows(file, aborted, state, "client, id, samples, digest, payload")]:  # fmt: skip
        found.append((client, tuple(row)))
        samples += row[1] if isinstance(row[1], int) else 0  # a damaged row is found when it is read
        if len(found) >= MOST_REQUESTS or samples >= MOST_SAMPLES:
            break
    return found


def any_open(file: LedgerFile, aborted: Aborted) -> bool:
    """Whether one of the requests is unfinished."""
    return any(_rows(file, aborted, state, "1") for state in (QUEUED, PAUSED, LEASED))


def any_leased(file: LedgerFile) -> bool:
    """Whether a request is leased."""
    return file.run(f"SELECT 1 FROM requests WHERE state={LEASED} AND {OPEN} LIMIT 1").fetchone() is not None


def _rows(file: LedgerFile, aborted: Aborted, state: int, columns: str) -> list[tuple[Any, ...]]:
    condition = f"state={state} AND {OPEN} AND seq<=?"
    if aborted.request_ids is None:
        return file.run(f"SELECT {columns} FROM requests WHERE {condition} ORDER BY seq LIMIT ?",
                        (aborted.upto, MOST_REQUESTS)).fetchall()
    rows = [file.run(f"SELECT {columns} FROM requests WHERE id=? AND {condition}", (name, aborted.upto)).fetchone()
            for name in aborted.request_ids]
    return [row for row in rows if row is not None]
