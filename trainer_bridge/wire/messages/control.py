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
from .message import Message, Numbered

_COUNT = Int()
_WORD = Text(MAX_NAME)
PauseMode = Literal["keep", "wait", "abort"]
PAUSE_MODES: tuple[PauseMode, ...] = ("keep", "wait", "abort")
"""keep: the samples that engines hold stop between two steps, and go on after the pause. wait: they finish. abort: they end
where they are. In each mode no request begins before the pause is over."""


@dataclass(frozen=True)
class _RowsRequest(Numbered):
    """C: asks for rows of a long list, from place `first` on."""

    first: int


@dataclass(frozen=True)
class _Rows(Numbered):
    """G: rows of a list of `total`, from the place asked for on, as many as one message holds."""

    total: int
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class _Outcome(Numbered):
    """G: what the message of this number wants is done, or is refused for the reason `error`."""

    error: str
    SCHEMA = (_COUNT, Text(MAX_TEXT))


class EnginesRequest(_RowsRequest):
    """C: asks for the engines from place `first` on."""

    KIND = 50
    SCHEMA = (_COUNT, Int(0, MAX_ENGINES))


class Engines(_Rows):
    """G: engines, each as (id, pid, node, device, state, version, tokens per second, reason, further figures by name)."""

    KIND = 51
    SCHEMA = (_COUNT, Int(0, MAX_ENGINES), Many(Row((
        _COUNT, Optional(_COUNT), _WORD, _WORD, _WORD, _COUNT, Number(), Text(MAX_FIGURE_TEXT),
        Many(Row((Text(MAX_ENGINE_FIGURE), Number())), MAX_ENGINE_FIGURES))), MAX_ENGINE_ROWS))


@dataclass(frozen=True)
class Scale(Numbered):
    """C: the service must have this many engines. A Scaled of the same number answers."""

    engines: int
    KIND = 52
    SCHEMA = (_COUNT, Int(1, MAX_ENGINES))


class Scaled(_Outcome):
    """G: answers Scale: the cluster has taken the new number of engines, or refuses it."""

    KIND = 53


class Drain(Message):
    """C: the gateway must lease nothing more, wait for what the engines hold, and stop. Stopping answers."""

    KIND = 54


@dataclass(frozen=True)
class Pause(Numbered):
    """C: the service must pause. A Done of the same number answers when no engine makes a step. `reset_cache`: K/V that is
    kept for other requests is forgotten then."""

    mode: str
    reset_cache: bool
    KIND = 55
    SCHEMA = (_COUNT, Choice(PAUSE_MODES), Flag())


class Resume(Numbered):
    """C: the pause is over. A Done of the same number answers when the engines go on."""

    KIND = 56


@dataclass(frozen=True)
class Abort(Numbered):
    """C: the unfinished samples of these requests must end where they are, and be delivered so; those of all requests when
    `ids` is empty. A Done of the same number answers when the ledger has them."""

    ids: tuple[str, ...]
    KIND = 57
    SCHEMA = (_COUNT, Many(Text(MAX_ID, empty=False), MAX_ABORTS))


class ResetPrefixCache(Numbered):
    """C: the engines must forget K/V that they keep for other requests. A Done of the same number answers."""

    KIND = 58


class Done(_Outcome):
    """G: answers Pause, Resume, Abort and ResetPrefixCache."""

    KIND = 59


class TensorsRequest(_RowsRequest):
    """C: asks for the tensors of a weight version from place `first` on."""

    KIND = 60
    SCHEMA = (_COUNT, Int(0, MAX_TENSORS))


class Tensors(_Rows):
    """G: tensors of a weight version, each as (name, dtype, shape)."""

    KIND = 61
    SCHEMA = (_COUNT, Int(0, MAX_TENSORS), Many(Row((
        Text(MAX_TENSOR_NAME, empty=False), _WORD, Many(_COUNT, MAX_NDIM))), MAX_FORMS))
