"""A client's control session: it pushes weights and stops the gateway. One call at a time; the others wait."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from ..wire.keys import ClientKeys
from ..wire.messages import Shutdown, Stopping
from .connection import Connection, SessionLost
from .service_control import ServiceControl
from .weight_pusher import WeightPusher


class ControlSession:
    """Opened at its first call, with the control key of `keys`. Each call counts `timeout` from its begin."""

    def __init__(self, address: str, client_id: str, keys: ClientKeys | None, timeout: float) -> None:
        self._address, self._client_id, self._keys, self._timeout = address, client_id, keys, timeout
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._pusher: WeightPusher | None = None

    def push(self, version: int, tensors: Mapping[str, Any], *, allow_gap: bool, in_flight: str) -> int:
        """See RolloutClient.push_weights."""
        with self._lock:
            connection = self._opened()
            if self._pusher is None:
                self._pusher = WeightPusher(connection)
            return self._pusher.push(version, tensors, allow_gap=allow_gap, in_flight=in_flight)

    def shutdown(self) -> None:
        """Stops the gateway; returns when the gateway has said that it stops."""
        with self._lock:
            control = self._opened()
            while True:
                try:
                    if not control.is_open:
                        control.open()
                    control.send(Shutdown())
                    while not any(isinstance(message, Stopping) for message in control.receive(0.2)):
                        pass
                    # The gateway waits until the sessions it has told are closed.
                    control.drop()
                    return
                except SessionLost:
                    control.drop()

    def another(self) -> ServiceControl:
        """A control session of its own, with the same keys."""
        return ServiceControl(self._address, keys=self._keys, timeout=self._timeout)

    def close(self) -> None:
        """Closes the connection, after the call that uses it."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()

    def _opened(self) -> Connection:
        if self._connection is None:
            self._connection = Connection(self._address, self._client_id, keys=self._keys, control=True, timeout=self._timeout)
        self._connection.restart_timeout()
        return self._connection
