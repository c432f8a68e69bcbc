"""Which queued requests are leased next, where clients take turns."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from .ledger_file import OPEN, QUEUED, LedgerFile

MOST = 256
"""Most requests of one lease. A lease is one transaction, and clients that come meanwhile wait for it."""


def queued_clients(file: LedgerFile) -> list[str]:
    """Clients with a queued request. Each is found by a seek in the index, however many requests it has queued."""
    return [row[0] for row in file.run(
        "WITH RECURSIVE found(client) AS ("
        f"SELECT MIN(client) FROM requests WHERE state={QUEUED} AND {OPEN} UNION ALL "
        f"SELECT (SELECT MIN(client) FROM requests WHERE state={QUEUED} AND {OPEN} AND client > found.client) "
        "FROM found WHERE found.client IS NOT NULL) SELECT client FROM found WHERE client IS NOT NULL")]  # fmt: skip


def in_turn(file: LedgerFile, most: int, in_flight: Mapping[str, int]) -> list[tuple[str, tuple[Any, ...]]]:
    """Client and row (id, samples, digest, payload) of each request to lease: always the oldest of the client with the fewest
    samples in flight.

    With `most` samples in flight only clients go on that have less than their share of them, so at most twice as many
    are; and one request more, where a client has none in flight.

    Args:
        in_flight: samples in flight, by client.
    """
    flight = dict(in_flight)
    waiting = {client: _Queue(file, client) for client in queued_clients(file)}
    share = most // max(1, len(flight.keys() | waiting.keys()))
    total, found = sum(flight.values()), list[tuple[str, tuple[Any, ...]]]()
    while waiting and len(found) < MOST:
        client = min(waiting, key=lambda client: flight.get(client, 0))
        row = next(waiting[client], None)
        has = flight.get(client, 0)
        samples = row[1] if row is not None and isinstance(row[1], int) else 0  # a damaged row is found when it is read
        if row is None or (has and total + samples > most and has + samples > share):
            del waiting[client]
            continue
        found.append((client, row))
        flight[client], total = has + samples, total + samples
    return found


class _Queue(Iterator[tuple[Any, ...]]):
    """The queued requests of a client, oldest first, read a few at a time."""

    def __init__(self, file: LedgerFile, client: str) -> None:
        self._file, self._client = file, client
        self._rows: deque[tuple[Any, ...]] = deque()
        self._after = -1

    def __next__(self) -> tuple[Any, ...]:
        if not self._rows:
            self._rows.extend(self._file.run(
                f"SELECT seq, id, samples, digest, payload FROM requests WHERE state={QUEUED} AND client=? AND {OPEN} AND seq>? "
                "ORDER BY seq LIMIT 32", (self._client, self._after)))  # fmt: skip
            if not self._rows:
                raise StopIteration
        self._after, *row = self._rows.popleft()
        return tuple(row)
