"""Messages that operate a service: its engines one by one, their number, and a stop that loses no begun work. They are
accepted in a control session only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..codec import Int, Many, Number, Optional, Row, Text
from ..limits import (
    MAX_ENGINE_FIGURE,
    MAX_ENGINE_FIGURES,
    MAX_ENGINE_ROWS,
    MAX_ENGINES,
    MAX_FIGURE_TEXT,
    MAX_NAME,
    MAX_TEXT,
)
from .message import Message

_COUNT = Int()
_WORD = Text(MAX_NAME)


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
