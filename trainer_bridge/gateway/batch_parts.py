"""Records part of a client's batch in a ledger: new requests, requests it has already, and those it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import RequestError
from ...rollout.types import RolloutRequest
from ..wire.records import request_digest
from .ledger_counters import Change
from .ledger_file import FAILED, OPEN, QUEUED, STAGED, LedgerFile
from .retention import repeat_failure


@dataclass(frozen=True, slots=True)
class Part:
    """Part `index` of a client's batch: (request, its record) in order. The batch is queued after its `final` part."""

    client: str
    batch: str
    index: int
    requests: Sequence[tuple[RolloutRequest, bytes]]
    final: bool


Receipt = tuple[list[int], list[tuple[int, str]]]
"""Per request of a part, how many of its samples were acknowledged before; and the refused ones as (index, why)."""


def record_part(file: LedgerFile, part: Part, most: tuple[int, int], unfinished: int, new: Change) -> Receipt:
    """Inside a transaction: records a part.

    Args:
        most: samples of one request, and unfinished samples of the client, that are taken.
        unfinished: samples of the client that are to come, but for those of this transaction.
    """
    client, batch, run = part.client, part.batch, file.run
    acked, refused = list[int](), list[tuple[int, str]]()
    whole, staged = part.final and part.index == 0, False
    for i, (request, payload) in enumerate(part.requests):
        digest, place = request_digest(payload), (part.index << 16) + i
        acked.append(0)
        # Most requests are new: one statement records those.
        if not (why := _too_many(request, most, unfinished + new.unfinished[client])) and run(
                "INSERT INTO requests (id, client, batch, place, digest, samples, state, payload) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
                (request.id, client, batch, place, digest, request.samples, QUEUED if whole else STAGED, payload)).rowcount:
            new.unfinished[client] += request.samples
            new.requested += request.samples if whole else 0
            continue
        row = run("SELECT client, digest, state, acked FROM requests WHERE id=?", (request.id,)).fetchone()
        if row is None:
            refused.append((i, why))
        elif row[0] != client or row[1] != digest:
            what = "belongs to another client" if row[0] != client else "was already used with other content"
            refused.append((i, str(RequestError("id", f"{request.id!r} {what}", "give each new request a new id"))))
        elif row[2] == STAGED:
            staged = True
            run("UPDATE requests SET batch=?, place=? WHERE id=?", (batch, place, request.id))
        else:
            acked[i] = row[3]
            if row[2] == FAILED:
                repeat_failure(file, client, request.id, new)
    if part.final and (staged or not whole):
        wanted = f"state=? AND client=? AND batch=? AND {OPEN}"
        new.requested += file.value(
            f"SELECT COALESCE(SUM(samples), 0) FROM requests WHERE {wanted}", STAGED, client, batch)
        run(f"UPDATE requests SET state=? WHERE {wanted}", (QUEUED, STAGED, client, batch))
    return acked, refused


def forget_staged(file: LedgerFile, client: str, batch: str | None, new: Change) -> None:
    """Inside a transaction: what came of a batch that will not be finished, or of all of a client, is as if it had not come."""
    staged, values = f"state=? AND client=? AND {OPEN}", [STAGED, client]
    if batch is not None:
        staged, values = f"{staged} AND batch=?", [*values, batch]
    new.unfinished[client] -= file.value(f"SELECT COALESCE(SUM(samples), 0) FROM requests WHERE {staged}", *values)
    file.run(f"DELETE FROM requests WHERE {staged}", values)


def _too_many(request: RolloutRequest, most: tuple[int, int], unfinished: int) -> str:
    """Why a new request has too many samples; empty when it has not."""
    if request.samples > most[0]:
        return str(RequestError("samples", f"request {request.id!r} has {request.samples}, at most {most[0]} are taken",
                                "split the group over several requests"))
    if unfinished + request.samples > most[1]:
        return str(RequestError("samples", f"with request {request.id!r} this client would have "
                                f"{unfinished + request.samples} unfinished, at most {most[1]} are taken",
                                "collect results, or cancel requests, before submitting more"))
    return ""
