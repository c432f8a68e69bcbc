"""Every message between a trainer and the gateway: fields, limits, kinds.

Invariants:
- A message is a list of frames: one header (see `codec`) and the blobs its class declares, nothing else.
- `decode(encode(m)) == m`; the blobs of requests and trajectories are the records of `records`, lossless.
- `decode` raises TransportError and nothing else, whatever the bytes, and takes memory in proportion to them.

Direction: C is the trainer's client, G the gateway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, cast

from ..rollout.backend import IN_FLIGHT_POLICIES
from .codec import (
    MAX_HEADER,
    Buffer,
    Choice,
    Field,
    Flag,
    Int,
    Many,
    Number,
    Row,
    Text,
    read_header,
    refuse,
    write_header,
)
from .records import MAX_ID, MAX_REQUEST, MAX_SAMPLES, MAX_TRAJECTORY

MAX_CHUNK = 1 << 20
MAX_MANIFEST = 16 << 20
MAX_PER_SUBMIT = 32
MAX_ACKS = 128
MAX_FRAMES = 1 + MAX_PER_SUBMIT
MAX_STATS = 512
TO_GATEWAY = max(MAX_REQUEST, MAX_CHUNK, MAX_MANIFEST, MAX_HEADER)
"""Largest frame a gateway reads, bytes."""
TO_CLIENT = MAX_TRAJECTORY + 2 * MAX_HEADER
"""Largest message a client reads, bytes; its frames come joined."""

_ID = Text(MAX_ID, empty=False)
_NAME = Text(128, empty=False)
_SAMPLE = Int(0, MAX_SAMPLES - 1)
_COUNT = Int()
_TEXT = Text(1024)


@dataclass(frozen=True)
class Blobs:
    """The raw frames behind a header: how many, and how long each may be."""

    most: int
    size: int
    least: int = 1


class Message:
    """One message; `SCHEMA` checks the header fields in order, `BLOBS` the frames of the last field, if it has one."""

    KIND: ClassVar[int]
    SCHEMA: ClassVar[tuple[Field[Any], ...]] = ()
    BLOBS: ClassVar[Blobs | None] = None


@dataclass(frozen=True)
class Hello(Message):
    """C: opens a session. `control` asks for the control plane; `credit` as in Credit. This life of the client has
    everything up to number `cursor` of the ledger named `ledger`."""

    client: str
    control: bool
    credit: int
    ledger: str
    cursor: int
    KIND = 1
    SCHEMA = (_NAME, Flag(), _COUNT, Text(128), _COUNT)


@dataclass(frozen=True)
class Welcome(Message):
    """G: the session is open. `ledger` names the ledger, `version` the weights that serve."""

    ledger: str
    version: int
    KIND = 2
    SCHEMA = (_NAME, _COUNT)


@dataclass(frozen=True)
class Reset(Message):
    """G: no session is open for this connection; say Hello again."""

    KIND = 3


@dataclass(frozen=True)
class Refused(Message):
    """G: what `about` names (a batch, a push, the session when empty) is refused for good; `text` says why."""

    about: str
    error: str
    text: str
    KIND = 4
    SCHEMA = (Text(128), Choice(("request", "storage", "transport", "cluster")), _TEXT)


@dataclass(frozen=True)
class Ping(Message):
    """C: is the gateway alive?"""

    KIND = 5


@dataclass(frozen=True)
class Pong(Message):
    """G: it is. `notice` tells what keeps it from working (a full disk, no live engine), empty when nothing does."""

    version: int
    notice: str
    KIND = 6
    SCHEMA = (_COUNT, _TEXT)


@dataclass(frozen=True)
class Submit(Message):
    """C: part `index` of a batch of requests; the batch is dispatched, as one, after its `final` part."""

    batch: str
    index: int
    final: bool
    requests: tuple[bytes, ...]
    KIND = 10
    SCHEMA = (_NAME, Int(0, 1 << 20), Flag())
    BLOBS = Blobs(MAX_PER_SUBMIT, MAX_REQUEST, least=0)


@dataclass(frozen=True)
class Submitted(Message):
    """G: the part is recorded. `acked[i]`: samples of its request i acknowledged so far; `refused`: (i, why)."""

    batch: str
    index: int
    acked: tuple[int, ...]
    refused: tuple[tuple[int, str], ...]
    KIND = 11
    SCHEMA = (_NAME, Int(0, 1 << 20), Many(Int(0, MAX_SAMPLES), MAX_PER_SUBMIT),
              Many(Row((Int(0, MAX_PER_SUBMIT - 1), _TEXT)), MAX_PER_SUBMIT))


@dataclass(frozen=True)
class Credit(Message):
    """C: the gateway may send deliveries until it has sent `granted` bytes of them since Hello."""

    granted: int
    KIND = 12
    SCHEMA = (_COUNT,)


@dataclass(frozen=True)
class Delivery(Message):
    """G: one trajectory (`blobs[0]`, its record), number `number` of the ledger; numbers grow within a session. Sent to
    each life of the client until acknowledged."""

    number: int
    request_id: str
    sample: int
    blobs: tuple[bytes, ...]
    KIND = 13
    SCHEMA = (_COUNT, _ID, _SAMPLE)
    BLOBS = Blobs(1, MAX_TRAJECTORY)


@dataclass(frozen=True)
class Failure(Message):
    """G: the request cannot be served; otherwise like Delivery, acknowledged as sample -1."""

    number: int
    request_id: str
    error: str
    KIND = 14
    SCHEMA = (_COUNT, _ID, _TEXT)


@dataclass(frozen=True)
class Ack(Message):
    """C: these samples (-1: the failure of the request) have reached the trainer for good."""

    number: int
    keys: tuple[tuple[str, int], ...]
    KIND = 15
    SCHEMA = (_COUNT, Many(Row((_ID, Int(-1, MAX_SAMPLES - 1))), MAX_ACKS))


@dataclass(frozen=True)
class Acked(Message):
    """G: acknowledgement `number` is recorded; none of its samples is sent again."""

    number: int
    KIND = 16
    SCHEMA = (_COUNT,)


@dataclass(frozen=True)
class StatusRequest(Message):
    """C: asks for Status."""

    number: int
    KIND = 17
    SCHEMA = (_COUNT,)


@dataclass(frozen=True)
class Status(Message):
    """G: figures of ledger, gateway and engines, by name."""

    number: int
    figures: tuple[tuple[str, float | int | str], ...]
    KIND = 18
    SCHEMA = (_COUNT, Many(Row((_NAME, Number())), MAX_STATS))


@dataclass(frozen=True)
class PushBegin(Message):
    """C, control plane: a weight version follows. `in_flight`: what happens to sequences in flight at its commit."""

    push: str
    in_flight: str
    manifest: tuple[bytes, ...]
    KIND = 30
    SCHEMA = (_NAME, Choice(IN_FLIGHT_POLICIES))
    BLOBS = Blobs(1, MAX_MANIFEST)


@dataclass(frozen=True)
class PushChunk(Message):
    """C, control plane: bytes of tensor `index` of the manifest from `offset` on."""

    push: str
    index: int
    offset: int
    data: tuple[Buffer, ...]
    KIND = 31
    SCHEMA = (_NAME, _COUNT, _COUNT)
    BLOBS = Blobs(1, MAX_CHUNK)


@dataclass(frozen=True)
class PushCommit(Message):
    """C, control plane: every chunk is sent; commit."""

    push: str
    KIND = 32
    SCHEMA = (_NAME,)


@dataclass(frozen=True)
class PushAbort(Message):
    """C, control plane: drop what is staged."""

    push: str
    KIND = 33
    SCHEMA = (_NAME,)


@dataclass(frozen=True)
class PushState(Message):
    """G: how far a push is. `received` chunks are staged; `committed` tells that `version` serves."""

    push: str
    received: int
    committed: bool
    version: int
    KIND = 34
    SCHEMA = (_NAME, _COUNT, Flag(), _COUNT)


@dataclass(frozen=True)
class Shutdown(Message):
    """C, control plane: the gateway stops; its ledger keeps what is not acknowledged."""

    KIND = 40


@dataclass(frozen=True)
class Stopping(Message):
    """G: it does."""

    KIND = 41


KINDS: dict[int, type[Message]] = {c.KIND: c for c in Message.__subclasses__()}


def encode(message: Message) -> list[Buffer]:
    """Frames of a message, header first. Raises TransportError for a field outside its limits."""
    kind = type(message)
    values = [getattr(message, f.name) for f in fields(cast(Any, message))]
    blobs: tuple[Buffer, ...] = ()
    if kind.BLOBS is not None:
        blobs = tuple(values.pop())
        _check_blobs(kind, blobs)
    packed = [s.pack(v, kind.__name__) for s, v in zip(kind.SCHEMA, values, strict=True)]
    return [write_header(kind.KIND, packed), *blobs]


def decode(frames: Sequence[Buffer]) -> Message:
    """The message of these frames. Raises TransportError for anything but a well-formed message."""
    if not frames:
        raise refuse("message", "no frames")
    number, values = read_header(frames[0])
    kind = KINDS.get(number)
    if kind is None:
        raise refuse("message", f"unknown kind {number}")
    if len(values) != len(kind.SCHEMA):
        raise refuse(kind.__name__, f"{len(values)} fields, expected {len(kind.SCHEMA)}")
    checked: list[Any] = [s.unpack(v, kind.__name__) for s, v in zip(kind.SCHEMA, values, strict=True)]
    blobs = tuple(frames[1:])
    if kind.BLOBS is not None:
        _check_blobs(kind, blobs)
        checked.append(blobs)
    elif blobs:
        raise refuse(kind.__name__, f"{len(blobs)} frames too many")
    return kind(*checked)


def _check_blobs(kind: type[Message], blobs: Sequence[Buffer]) -> None:
    limit = cast(Blobs, kind.BLOBS)
    if not limit.least <= len(blobs) <= limit.most:
        raise refuse(kind.__name__, f"{len(blobs)} frames behind the header, expected {limit.least}..{limit.most}")
    for blob in blobs:
        if len(blob) > limit.size:
            raise refuse(kind.__name__, f"a frame of {len(blob)} bytes, at most {limit.size} are read")
