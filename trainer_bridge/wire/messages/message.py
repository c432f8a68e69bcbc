"""What all messages have in common: a numbered kind, header fields, raw frames; and how they become bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, cast

from ..codec import Buffer, Field, Int, read_header, refuse, write_header

KINDS: dict[int, type[Message]] = {}
"""Every message class by its number on the wire."""


@dataclass(frozen=True)
class Blobs:
    """The raw frames behind a header: at least `least` and at most `most` of them, each of at most `size` bytes."""

    most: int
    size: int
    least: int = 1


@dataclass(frozen=True)
class Message:
    """One message. A subclass that adds fields is a frozen dataclass too.

    Attributes:
        KIND: the class's number on the wire.
        SCHEMA: the types and limits of the header fields, in order.
        BLOBS: number and size of the raw frames, which are the last field; None for a message of a header alone.
    """

    KIND: ClassVar[int]
    SCHEMA: ClassVar[tuple[Field[Any], ...]] = ()
    BLOBS: ClassVar[Blobs | None] = None

    def __init_subclass__(cls) -> None:
        if "KIND" in vars(cls):
            assert cls.KIND not in KINDS, f"two messages have number {cls.KIND}"
            KINDS[cls.KIND] = cls


@dataclass(frozen=True)
class Numbered(Message):
    """A question of a client, or the answer of the gateway that has the same number."""

    number: int
    SCHEMA: ClassVar[tuple[Field[Any], ...]] = (Int(),)


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
