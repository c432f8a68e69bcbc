"""Messages that operate a service: its engines one by one, their number, a stop that loses no begun work, pauses, aborted
requests, and the tensors that a weight version has. They are accepted in a control session only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..codec import Choice, Flag, Int, Many, Number, Optional, Row, Text
from ..limits import (
    MAX_ABORTS,
    MAX_ENGINE_FIGURE,
    MAX_ENGINE_FIGURES,
    MAX_ENGINE_ROWS,
    MAX_ENGINES,
    MAX_FIGURE_TEXT,
    MAX_FORMS,
    MAX_ID,
    MAX_NAME,
    MAX_NDIM,
    MAX_TENSOR_NAME,
    MAX_TENSORS,
    MAX_TEXT,
)
from .message import Message

_COUNT = Int()
_WORD = Text(MAX_NAME)
PauseMode = Literal["keep", "wait", "abort"]
PAUSE_MODES: tuple[PauseMode, ...] = ("keep", "wait", "abort")
"""keep: the samples that engines hold stop between two steps, and go on after the pause. wait: they finish. abort: they end
where they are. In each mode no request begins before the pause is over."""


@dataclass(frozen=True)
class EnginesRequest(Message):
    """C: asks for the engines from place `first` on."""

    number: int
    first: int
    KIND = 50
    SCHEMA = (_COUNT, Int(0, MAX_ENGINES))


@dataclass(frozen=True)
class Engines(Message):
    """G: `total` engines exist. `rows` are those from the place asked for on, as many as one message holds, each as (id, pid,
    node, device, state, version, tokens per second, reason, further figures by name)."""

    number: int
    total: int
    rows: tuple[tuple[Any, ...], ...]
    KIND = 51
    SCHEMA = (_COUNT, Int(0, MAX_ENGINES), Many(Row((
        _COUNT, Optional(_COUNT), _WORD, _WORD, _WORD, _COUNT, Number(), Text(MAX_FIGURE_TEXT),
        Many(Row((Text(MAX_ENGINE_FIGURE), Number())), MAX_ENGINE_FIGURES))), MAX_ENGINE_ROWS))


@dataclass(frozen=True)
class Scale(Message):
    """C: the service must have this many engines. A Scaled of the same number answers."""

    number: int
    engines: int
    KIND = 52
    SCHEMA = (_COUNT, Int(1, MAX_ENGINES))


@dataclass(frozen=True)
class Scaled(Message):
    """G: the cluster has taken the new number of engines, or refuses it for the reason `error`."""

    number: int
    error: str
    KIND = 53
    SCHEMA = (_COUNT, Text(MAX_TEXT))


@dataclass(frozen=True)
class Drain(Message):
    """C: the gateway must lease nothing more, wait for what the engines hold, and stop. Stopping answers."""

    KIND = 54


@dataclass(frozen=True)
class Pause(Message):
    """C: the service must pause. A Done of the same number answers when no engine makes a step. `reset_cache`: K/V that is
    kept for other requests is forgotten then."""

    number: int
    mode: str
    reset_cache: bool
    KIND = 55
    SCHEMA = (_COUNT, Choice(PAUSE_MODES), Flag())


@dataclass(frozen=True)
class Resume(Message):
    """C: the pause is over. A Done of the same number answers when the engines go on."""

    number: int
    KIND = 56
    SCHEMA = (_COUNT,)


@dataclass(frozen=True)
class Abort(Message):
    """C: the unfinished samples of these requests must end where they are, and be delivered so; those of all requests when
    `ids` is empty. A Done of the same number answers when the ledger has them."""

    number: int
    ids: tuple[str, ...]
    KIND = 57
    SCHEMA = (_COUNT, Many(Text(MAX_ID, empty=False), MAX_ABORTS))


@dataclass(frozen=True)
class ResetPrefixCache(Message):
    """C: the engines must forget K/V that they keep for other requests. A Done of the same number answers."""

    number: int
    KIND = 58
    SCHEMA = (_COUNT,)


@dataclass(frozen=True)
class Done(Message):
    """G: what the message of this number wants is done, or is refused for the reason `error`."""

    number: int
    error: str
    KIND = 59
    SCHEMA = (_COUNT, Text(MAX_TEXT))


@dataclass(frozen=True)
class TensorsRequest(Message):
    """C: asks for the tensors of a weight version from place `first` on."""

    number: int
    first: int
    KIND = 60
    SCHEMA = (_COUNT, Int(0, MAX_TENSORS))


@dataclass(frozen=True)
class Tensors(Message):
    """G: a weight version has `total` tensors. `rows` are those from the place asked for on, as many as one message holds,
    each as (name, dtype, shape)."""

    number: int
    total: int
    rows: tuple[tuple[Any, ...], ...]
    KIND = 61
    SCHEMA = (_COUNT, Int(0, MAX_TENSORS), Many(Row((
        Text(MAX_TENSOR_NAME, empty=False), _WORD, Many(_COUNT, MAX_NDIM))), MAX_FORMS))
