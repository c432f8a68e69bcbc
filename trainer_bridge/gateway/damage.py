"""Reads rows of a ledger file, and finds those whose content is not what was recorded.

A damaged row fails its own request, with a reason that names the row. It keeps no other request from being served.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import TransportError
from ...rollout.types import RolloutRequest
from ..wire.limits import MAX_ID
from ..wire.records import FAILURE, decode_request, decode_trajectory, request_digest
from .ledger_counters import Change
from .ledger_file import DONE, UNACKED, LedgerFile
from .retention import fail

_log = logging.getLogger(__package__)


@dataclass(frozen=True, slots=True)
class Pending:
    """A recorded trajectory that is not acknowledged, or a failure, whose sample is -1 and whose payload is the
    reason."""

    seq: int
    request_id: str
    sample: int
    payload: bytes


def read_request(request_id: str, samples: object, digest: object, payload: object) -> RolloutRequest | str:
    """The request of a row, or what is wrong with the row. The digest finds a change of any bit."""
    where = f"the ledger's row of request {request_id!r} is damaged"
    try:
        if not isinstance(payload, bytes):
            return f"{where}: {type(payload).__name__} where its record was"
        if request_digest(payload) != digest:
            return f"{where}: its {len(payload)} bytes do not have its digest"
        request = decode_request(payload)
    except TransportError as error:
        return f"{where}: {error}"
    if (request.id, request.samples) != (request_id, samples):
        return f"{where}: it holds {request.samples} samples of {request.id!r}"
    return request


def read_requests(found: Sequence[tuple[str, tuple[Any, ...]]]
                  ) -> tuple[list[tuple[str, RolloutRequest]], list[tuple[str, str, str]]]:  # fmt: skip
    """Of rows (id, samples, digest, payload) of clients: (client, request) of each that is whole, and (client, id, what is
    wrong) of each that is damaged."""
    read = [(client, row[0], read_request(*row)) for client, row in found]
    return ([(client, request) for client, _, request in read if not isinstance(request, str)],
            [(client, request_id, why) for client, request_id, why in read if isinstance(why, str)])


def read_pending(file: LedgerFile, client: str, after: int, max_bytes: int, check_to: int
                 ) -> tuple[list[Pending], dict[str, str]]:
    """Unacknowledged outputs of a client's requests with seq > after, oldest first, and stops behind `max_bytes`; and what
    is wrong with the damaged rows on the way, by request id.

    Args: check_to: trajectories up to this seq are decoded, which takes 0.2 ms each; those behind it were written by this
        process and are not.
    """
    found, damaged = list[Pending](), dict[str, str]()
    for seq, request_id, sample, payload in file.run(
            f"SELECT seq, request_id, sample, payload FROM trajectories WHERE client=? AND {UNACKED} AND seq>? ORDER BY seq",
            (client, after)):
        if not isinstance(request_id, str) or not 0 < len(request_id.encode("utf-8", "replace")) <= MAX_ID:
            _log.error("%s: row %d of the trajectories is damaged: it names no request", file.path, seq)
            continue
        if sample == FAILURE:
            payload = payload if isinstance(payload, bytes) else b"the reason is damaged in the ledger"
        elif seq <= check_to and (why := _trajectory_damage(request_id, sample, payload)):
            damaged.setdefault(request_id, why)
            continue
        found.append(Pending(seq, request_id, sample, payload))
        max_bytes -= len(payload)
        if max_bytes <= 0:
            break
    return found, damaged


def fail_damaged(file: LedgerFile, request_id: str, client: str, why: str, new: Change) -> None:
    """Inside a transaction: fails a request of which a row is damaged. Its damaged trajectories are deleted and count as
    failed, not as unique."""
    _log.error("%s: %s", file.path, why)
    lost = [seq for seq, sample, payload in file.run(
        f"SELECT seq, sample, payload FROM trajectories WHERE request_id=? AND sample<>? AND {UNACKED}", (request_id, FAILURE))
        if _trajectory_damage(request_id, sample, payload)]
    for seq in lost:
        file.run("DELETE FROM trajectories WHERE seq=?", (seq,))
    row = file.run("SELECT samples, recorded, state FROM requests WHERE id=?", (request_id,)).fetchone()
    samples, recorded, state = row if row and all(type(value) is int for value in row) else (0, 0, DONE)
    file.run("UPDATE requests SET recorded=? WHERE id=?", (recorded - len(lost), request_id))
    new.unique -= len(lost)
    new.failed += len(lost)
    fail(file, request_id, client, samples - recorded if state < DONE else 0, why.encode("utf-8", "replace")[:1000], new)


def _trajectory_damage(request_id: str, sample: object, payload: object) -> str:
    """What is wrong with a row of a trajectory; empty when nothing is."""
    where = f"the ledger's row of request {request_id!r}, sample {sample!r:.20}, is damaged"
    try:
        key = decode_trajectory(payload).key if isinstance(payload, bytes) else None
    except TransportError as error:
        return f"{where}: {error}"
    return "" if key == (request_id, sample) else f"{where}: it holds {key or type(payload).__name__}"
