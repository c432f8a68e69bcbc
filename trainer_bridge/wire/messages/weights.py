"""Messages of a weight push. They are accepted in a control session only."""

from __future__ import annotations

from dataclasses import dataclass

from ....rollout.backend import IN_FLIGHT_POLICIES
from ..codec import Buffer, Choice, Flag, Int, Text
from ..limits import MAX_CHUNK, MAX_MANIFEST, MAX_NAME
from .message import Blobs, Message

_NAME = Text(MAX_NAME, empty=False)
_COUNT = Int()


@dataclass(frozen=True)
class _OfPush(Message):
    push: str
    SCHEMA = (_NAME,)


@dataclass(frozen=True)
class PushBegin(Message):
    """C: a weight version follows, whose manifest is `manifest[0]`. `in_flight`: what its commit does to sequences in
    flight."""

    push: str
    in_flight: str
    manifest: tuple[bytes, ...]
    KIND = 30
    SCHEMA = (_NAME, Choice(IN_FLIGHT_POLICIES))
    BLOBS = Blobs(1, MAX_MANIFEST)


@dataclass(frozen=True)
class PushNeeds(Message):
    """G: answers a PushBegin whose version is to be pushed. `needed[0]` has a byte per tensor of the manifest: 1 where its
    chunks must come, 0 where they must not, because the gateway has the bytes."""

    push: str
    needed: tuple[Buffer, ...]
    KIND = 35
    SCHEMA = (_NAME,)
    BLOBS = Blobs(1, MAX_MANIFEST)


@dataclass(frozen=True)
class PushChunk(Message):
    """C: bytes of tensor `index` of the manifest, from byte `offset` on. Only tensors that PushNeeds names are sent."""

    push: str
    index: int
    offset: int
    data: tuple[Buffer, ...]
    KIND = 31
    SCHEMA = (_NAME, _COUNT, _COUNT)
    BLOBS = Blobs(1, MAX_CHUNK)


class PushCommit(_OfPush):
    """C: every chunk that is needed is sent. The gateway commits the version."""

    KIND = 32


class PushAbort(_OfPush):
    """C: the gateway must drop what it has staged of this push."""

    KIND = 33


@dataclass(frozen=True)
class PushState(Message):
    """G: `received` chunks of a push are staged, or the version is `committed`. `version` is the one that serves."""

    push: str
    received: int
    committed: bool
    version: int
    KIND = 34
    SCHEMA = (_NAME, _COUNT, Flag(), _COUNT)
