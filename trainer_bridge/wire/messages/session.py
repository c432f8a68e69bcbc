"""Messages that open, watch and end a session."""

from __future__ import annotations

from dataclasses import dataclass

from ..codec import Choice, Flag, Int, Text
from ..limits import MAX_NAME, MAX_TEXT
from .message import Message

_NAME = Text(MAX_NAME, empty=False)
_COUNT = Int()
_TEXT = Text(MAX_TEXT)


@dataclass(frozen=True)
class Hello(Message):
    """C: opens a session.

    Attributes:
        control: whether it is a control session, which pushes weights and stops the gateway.
        credit: see Credit.
        ledger, cursor: this client has received every delivery up to number `cursor` of the ledger of this name.
    """

    client: str
    control: bool
    credit: int
    ledger: str
    cursor: int
    KIND = 1
    SCHEMA = (_NAME, Flag(), _COUNT, Text(MAX_NAME), _COUNT)


@dataclass(frozen=True)
class Welcome(Message):
    """G: the session is open. `ledger` names the ledger, `version` the weights that serve."""

    ledger: str
    version: int
    KIND = 2
    SCHEMA = (_NAME, _COUNT)


class Reset(Message):
    """G: no session is open for this connection. The client must send Hello again."""

    KIND = 3


@dataclass(frozen=True)
class Refused(Message):
    """G: a batch, a push or a session is refused for good.

    Attributes:
        about: name of the batch or the push; empty for the session.
        error: which exception of `errors` the client raises.
        text: why.
    """

    about: str
    error: str
    text: str
    KIND = 4
    SCHEMA = (Text(MAX_NAME), Choice(("request", "storage", "transport", "cluster")), _TEXT)


class Ping(Message):
    """C: asks for a Pong."""

    KIND = 5


@dataclass(frozen=True)
class Pong(Message):
    """G: the gateway is alive.

    Attributes:
        version: the weight version that serves.
        notice: what keeps the gateway from working (a full disk, no live engine); empty when nothing does.
    """

    version: int
    notice: str
    KIND = 6
    SCHEMA = (_COUNT, _TEXT)


class Shutdown(Message):
    """C, control session: asks the gateway to stop. Its ledger keeps what is not acknowledged."""

    KIND = 40


class Stopping(Message):
    """G: the gateway stops, as Shutdown asked."""

    KIND = 41
