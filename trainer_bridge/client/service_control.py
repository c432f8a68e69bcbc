"""The operator's end of the bridge: figures and engines of a running service, another number of engines, a stop; and what a
trainer needs beside its rollouts: pauses, aborted requests, weight versions from memory or from a directory.

Imports neither torch, Ray nor an engine.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from ...errors import ClusterError, TransportError
from ..wire import messages
from ..wire.keys import ClientKeys
from ..wire.limits import MAX_ABORTS
from .arguments import check_push, id_list
from .connection import Connection, SessionLost
from .weight_directory import directory_weights
from .weight_pusher import WeightPusher

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
        self._pusher = WeightPusher(self._connection)
        self._number = 0
        self.address = address

    def status(self) -> ServiceStatus:
        """Figures and engines. Raises TransportError when the gateway does not answer."""
        figures = self._ask(messages.StatusRequest, messages.Status)
        rows: list[EngineRow] = []
        while True:
            page = self._ask(partial(messages.EnginesRequest, first=len(rows)), messages.Engines)
            rows += [EngineRow(*row) for row in page.rows]
            if len(rows) >= page.total or not page.rows:
                return ServiceStatus(dict(figures.figures), tuple(rows))

    def scale(self, engines: int, timeout: float = 60.0) -> None:
        """Has the service change to this many engines; returns when the cluster has taken the number, before new engines
        have loaded. Raises ClusterError when it refuses."""
        if error := self._ask(lambda number: messages.Scale(number, engines), messages.Scaled, timeout).error:
            raise ClusterError(error)

    def pause(self, mode: messages.PauseMode = "keep", *, reset_cache: bool = False, timeout: float | None = None) -> None:
        """Pauses generation; returns when no engine makes a step. Requests that are submitted during a pause run after it.

        Args:
            mode: `keep` stops the samples that engines hold between two steps, and they go on at `resume`. `wait` lets them
            finish.
                `abort` ends every open request where it is: its samples are delivered with the tokens that they have and the
                finish reason `abort`, so that a trainer can go on from prompt and tokens.
            reset_cache: then forget K/V that is kept for other requests.
            timeout: seconds to wait; None for as long as the gateway answers. The pause holds after a TransportError too.

        Raises ClusterError where the cluster cannot be paused, or `resume` was called meanwhile.
        """
        self._act(lambda number: messages.Pause(number, mode, reset_cache), timeout)

    def resume(self) -> None:
        """Ends a pause; returns when the engines go on. Changes nothing where there is no pause."""
        self._act(messages.Resume)

    def paused(self) -> str:
        """The mode of the pause; empty while there is none."""
        return str(dict(self._ask(messages.StatusRequest, messages.Status).figures).get("paused", ""))

    def abort(self, request_ids: Iterable[str] | None = None) -> None:
        """Ends requests of any client where they are, as `pause("abort")` does; None: all open requests. Unknown ids are ignored.
        Returns when the ledger has every sample."""
        names = [] if request_ids is None else id_list(request_ids)
        for first in range(0, len(names), MAX_ABORTS) if request_ids is not None else [0]:
            self._act(partial(messages.Abort, ids=tuple(names[first : first + MAX_ABORTS])))

    def reset_prefix_cache(self) -> None:
        """Has the engines forget K/V that they keep for other requests. Samples that run keep their own."""
        self._act(messages.ResetPrefixCache)

    def expected_weights(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every tensor of a weight version, a tied head left out."""
        rows: list[tuple[Any, ...]] = []
        while True:
            page = self._ask(partial(messages.TensorsRequest, first=len(rows)), messages.Tensors)
            rows += page.rows
            if len(rows) >= page.total or not page.rows:
                return {name: (dtype, shape) for name, dtype, shape in rows}

    def push_weights(
        self, version: int, tensors: Mapping[str, Any], *, allow_gap: bool = False, in_flight: str = "finish"
    ) -> int:
        """See RolloutClient.push_weights."""
        check_push(version, tensors, allow_gap, in_flight)
        return self._pusher.push(version, tensors, allow_gap=allow_gap, in_flight=in_flight)

    def load_weights(self, version: int, directory: str | Path, *, allow_gap: bool = False, in_flight: str = "finish") -> int:
        """Makes the weights of a Hugging Face directory, which this process reads, those that serve. As `push_weights`; raises
        CheckpointError for a directory that does not hold exactly the policy's tensors."""
        return self.push_weights(version, directory_weights(directory, self.expected_weights()), allow_gap=allow_gap,
                                 in_flight=in_flight)

    def label_version(self, version: int) -> int:
        """Gives the weights that serve a greater version number, without a push. Ends nothing and forgets no K/V. Returns
        the version that serves. Raises TransportError for a smaller number, or while a version is being pushed."""
        return self._pusher.label(version)

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
                    self._connection.send(messages.Drain() if drain else messages.Shutdown())
                    asked = True
                if any(isinstance(message, messages.Stopping) for message in self._connection.receive(_WAIT_S)):
                    # The gateway waits until the sessions it has told are closed.
                    self._connection.drop()
                    return True
            except SessionLost:
                self._connection.drop()
            watch()
        return False

    def close(self) -> None:
        """Closes the sockets; safe to call twice."""
        self._connection.close()

    def _act(self, make: Callable[[int], messages.Message], timeout: float | None = None) -> None:
        """Sends a message that Done answers. Raises ClusterError for a refusal."""
        if error := self._ask(make, messages.Done, timeout).error:
            raise ClusterError(error)

    def _ask(self, make: Callable[[int], messages.Message], kind: type[T], timeout: float | None = None) -> T:
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
