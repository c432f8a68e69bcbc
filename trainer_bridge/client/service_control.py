"""The operator's end of the bridge: figures and engines of a running service, another number of engines, a stop.

Imports neither torch, Ray nor an engine.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from ...errors import ClusterError, TransportError
from ..wire.keys import ClientKeys
from ..wire.messages import (
    Drain,
    Engines,
    EnginesRequest,
    Message,
    Scale,
    Scaled,
    Shutdown,
    Status,
    StatusRequest,
    Stopping,
)
from .connection import Connection, SessionLost

_WAIT_S = 0.2
T = TypeVar("T")


@dataclass(frozen=True)
class EngineRow:
    """One engine of a service; see `rollout.cluster.spec.EngineStatus`."""

    id: int
    pid: int | None
    node: str
    device: str
    state: str
    version: int
    tokens_per_s: float
    reason: str
    figures: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class ServiceStatus:
    """A service at one moment: the figures of `RolloutClient.status`, and its engines."""

    figures: dict[str, float | int | str]
    engines: tuple[EngineRow, ...]

    def counts(self) -> dict[str, int]:
        """Samples requested and delivered once, samples in flight, and engines replaced, over the ledger's life or the
        service's."""
        names = {"requested": "requested", "unique": "unique", "in_flight": "in_flight", "restarts": "engine.restarts"}
        return {name: int(self.figures.get(figure, 0)) for name, figure in names.items()}


class ServiceControl:
    """A control session with a gateway, opened again when it breaks. One thread at a time. A context manager.

    Args:
        keys: with a control key; None on loopback.
        timeout: seconds of silence after which a call raises TransportError.
    """

    def __init__(self, address: str, *, keys: ClientKeys | None = None, timeout: float = 10.0) -> None:
        self._connection = Connection(address, f"operator-{uuid.uuid4().hex[:12]}", keys=keys, control=True, timeout=timeout)
        self._number = 0
        self.address = address

    def status(self) -> ServiceStatus:
        """Figures and engines. Raises TransportError when the gateway does not answer."""
        figures = self._ask(StatusRequest, Status)
        rows: list[EngineRow] = []
        while True:
            page = self._ask(partial(EnginesRequest, first=len(rows)), Engines)
            rows += [EngineRow(*row) for row in page.rows]
            if len(rows) >= page.total or not page.rows:
                return ServiceStatus(dict(figures.figures), tuple(rows))

    def scale(self, engines: int, timeout: float = 60.0) -> None:
        """Has the service change to this many engines; returns when the cluster has taken the number, before new engines
        have loaded. Raises ClusterError when it refuses."""
        if error := self._ask(lambda number: Scale(number, engines), Scaled, timeout).error:
            raise ClusterError(error)

    def stop(self, *, drain: bool, watch: Callable[[], Any] = lambda: None, timeout: float | None = None) -> bool:
        """Stops the service; returns whether it has said, within `timeout` seconds, that it stops.

        Args:
            drain: first let engines end the work they hold. Work that no engine holds stays in the ledger either way.
            watch: called every 0.2 s while the service drains.
        """
        end = None if timeout is None else time.monotonic() + timeout
        asked = False
        while end is None or time.monotonic() < end:
            self._connection.restart_timeout()
            try:
                if not self._connection.is_open:
                    self._connection.open()
                    asked = False
                if not asked:
                    self._connection.send(Drain() if drain else Shutdown())
                    asked = True
                if any(isinstance(message, Stopping) for message in self._connection.receive(_WAIT_S)):
                    # The gateway waits until the sessions it has told are closed.
                    self._connection.drop()
                    return True
            except SessionLost:
                self._connection.drop()
            watch()
        return False

    def close(self) -> None:
        """Closes the socket; safe to call twice."""
        self._connection.drop()

    def _ask(self, make: Callable[[int], Message], kind: type[T], timeout: float | None = None) -> T:
        """Sends a message with a new number and waits for the answer of that number."""
        self._number += 1
        number, asked = self._number, False
        self._connection.restart_timeout()
        end = None if timeout is None else time.monotonic() + timeout
        while end is None or time.monotonic() < end:
            try:
                if not self._connection.is_open:
                    self._connection.open()
                    asked = False
                if not asked:
                    self._connection.send(make(number))
                    asked = True
                for message in self._connection.receive(_WAIT_S):
                    if isinstance(message, kind) and message.number == number:  # type: ignore[attr-defined]
                        return message
            except SessionLost:
                self._connection.drop()
        raise TransportError(f"gateway {self.address} has not done what it was asked for within {timeout:g} s; "
                             "see the service's log")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()
