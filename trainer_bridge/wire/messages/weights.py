"""Messages of a weight push. They are accepted in a control session only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ....rollout.backend import IN_FLIGHT_POLICIES
from ..codec import Buffer, Choice, Field, Flag, Int, Text
from ..limits import MAX_CHUNK, MAX_MANIFEST, MAX_NAME
from .message import Blobs, Message

_NAME = Text(MAX_NAME, empty=False)
_COUNT = Int()


@dataclass(frozen=True)
class _OfPush(Message):
    """A step of the push of this name, or the answer to one."""

    push: str
    SCHEMA: ClassVar[tuple[Field[Any], ...]] = (_NAME,)


@dataclass(frozen=True)
class PushBegin(_OfPush):
    """C: a weight version follows, whose manifest is `manifest[0]`. `in_flight`: what its commit does to sequences in
    flight."""

    in_flight: str
    manifest: tuple[bytes, ...]
    KIND = 30
    SCHEMA = (_NAME, Choice(IN_FLIGHT_POLICIES))
    BLOBS = Blobs(1, MAX_MANIFEST)


@dataclass(frozen=True)
class PushNeeds(_OfPush):
    """G: answers a PushBegin whose version is to be pushed. `needed[0]` has a byte per tensor of the manifest: 1 where its
    chunks must come, 0 where they must not, because the gateway has the bytes."""

    needed: tuple[Buffer, ...]
    KIND = 35
    BLOBS = Blobs(1, MAX_MANIFEST)


@dataclass(frozen=True)
class PushChunk(_OfPush):
    """C: bytes of tensor `index` of the manifest, from byte `offset` on. Only tensors that PushNeeds names are sent."""

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
class PushLabel(_OfPush):
    """C: the weights that serve must have this version number. A PushState, or a Refused, about `push` answers."""

    version: int
    KIND = 36
    SCHEMA = (_NAME, _COUNT)


@dataclass(frozen=True)
class PushState(_OfPush):
    """G: `received` chunks of a push are staged, or the version is `committed`. `version` is the one that serves."""

    received: int
    committed: bool
    version: int
    KIND = 34
    SCHEMA = (_NAME, _COUNT, Flag(), _COUNT)
