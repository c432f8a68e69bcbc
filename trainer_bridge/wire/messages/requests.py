"""Messages that carry requests to the gateway, and trajectories, failures and figures back."""

from __future__ import annotations

from dataclasses import dataclass

from ..codec import Flag, Int, Many, Number, Row, Text
from ..limits import (
    MAX_ACKS,
    MAX_CANCELS,
    MAX_ID,
    MAX_NAME,
    MAX_PARTS,
    MAX_PER_SUBMIT,
    MAX_REQUEST,
    MAX_SAMPLES,
    MAX_STATS,
    MAX_TEXT,
    MAX_TRAJECTORY,
)
from .message import Blobs, Message, Numbered

_ID = Text(MAX_ID, empty=False)
_NAME = Text(MAX_NAME, empty=False)
_SAMPLE = Int(0, MAX_SAMPLES - 1)
_COUNT = Int()
_TEXT = Text(MAX_TEXT)


@dataclass(frozen=True)
class Submit(Message):
    """C: part `index` of a batch of requests. The gateway dispatches the whole batch at once, after its `final`
    part."""

    batch: str
    index: int
    final: bool
    requests: tuple[bytes, ...]
    KIND = 10
    SCHEMA = (_NAME, Int(0, MAX_PARTS), Flag())
    BLOBS = Blobs(MAX_PER_SUBMIT, MAX_REQUEST, least=0)


@dataclass(frozen=True)
class Submitted(Message):
    """G: the part is in the ledger.

    Attributes:
        acked: per request of the part, how many of its samples were acknowledged so far.
        refused: (place in the part, why) of each request that was refused.
    """

    batch: str
    index: int
    acked: tuple[int, ...]
    refused: tuple[tuple[int, str], ...]
    KIND = 11
    SCHEMA = (_NAME, Int(0, MAX_PARTS), Many(Int(0, MAX_SAMPLES), MAX_PER_SUBMIT),
              Many(Row((Int(0, MAX_PER_SUBMIT - 1), _TEXT)), MAX_PER_SUBMIT))


@dataclass(frozen=True)
class Credit(Message):
    """C: the gateway may send deliveries until it has sent `granted` bytes of them since Hello."""

    granted: int
    KIND = 12
    SCHEMA = (_COUNT,)


@dataclass(frozen=True)
class Delivery(Message):
    """G: one trajectory; its record is `blobs[0]`. Every new session of the client is sent it until it is acknowledged.

    Attributes:
        number: its number in the ledger; numbers grow within a session.
    """

    number: int
    request_id: str
    sample: int
    blobs: tuple[bytes, ...]
    KIND = 13
    SCHEMA = (_COUNT, _ID, _SAMPLE)
    BLOBS = Blobs(1, MAX_TRAJECTORY)


@dataclass(frozen=True)
class Failure(Message):
    """G: the request cannot be served. Sent like a Delivery, and acknowledged as sample -1."""

    number: int
    request_id: str
    error: str
    KIND = 14
    SCHEMA = (_COUNT, _ID, _TEXT)


@dataclass(frozen=True)
class Ack(Numbered):
    """C: the trainer has these (request id, sample) and wants them no more. Sample -1 is the failure of the request."""

    keys: tuple[tuple[str, int], ...]
    KIND = 15
    SCHEMA = (_COUNT, Many(Row((_ID, Int(-1, MAX_SAMPLES - 1))), MAX_ACKS))


class Acked(Numbered):
    """G: the Ack of this number is in the ledger. None of its samples is sent again."""

    KIND = 16


@dataclass(frozen=True)
class Cancel(Numbered):
    """C: the unfinished samples of these requests are not wanted. The requests fail with `why`. Ids of requests that the
    ledger does not hold, or that are finished, change nothing."""

    why: str
    ids: tuple[str, ...]
    KIND = 19
    SCHEMA = (_COUNT, _TEXT, Many(_ID, MAX_CANCELS))


class Cancelled(Numbered):
    """G: the Cancel of this number is in the ledger. A Failure follows for each request that it ended."""

    KIND = 20


class StatusRequest(Numbered):
    """C: asks for a Status of the same number."""

    KIND = 17


@dataclass(frozen=True)
class Status(Numbered):
    """G: figures of the ledger, the gateway and the engines, as (name, value)."""

    figures: tuple[tuple[str, float | int | str], ...]
    KIND = 18
    SCHEMA = (_COUNT, Many(Row((_NAME, Number())), MAX_STATS))
