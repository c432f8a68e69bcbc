"""The trainer's side of the control plane: pushing a weight version, stopping the gateway.

Invariants:
- A push ends in one of two ways: the version serves on every engine, or an exception and the old version serves.
- A push interrupted by a lost connection or a gateway restart is begun again from its first byte; one that was committed
  before the answer got lost is recognised by its digest and not committed twice.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Mapping
from typing import Any, cast

from .codec import Buffer
from .connection import Connection, SessionLost, refusal
from .keys import ClientKeys
from .messages import Message, PushAbort, PushBegin, PushChunk, PushCommit, PushState, Refused, Shutdown, Stopping
from .weights import ANY_PARENT, chunks, make_manifest

WINDOW = 16
"""Chunks on their way at once."""


class ControlPlane:
    """One trainer's control connection; opened on first use. One thread at a time."""

    def __init__(self, address: str, client_id: str, keys: ClientKeys | None, timeout: float) -> None:
        self._connection = Connection(address, client_id, keys=keys, control=True, timeout=timeout)
        self._inbox: deque[Message] = deque()

    def push(self, version: int, tensors: Mapping[str, Any], *, allow_gap: bool, in_flight: str) -> int:
        """Pushes and commits; returns the version that serves. See RolloutClient.push_weights."""
        manifest = make_manifest(version, ANY_PARENT if allow_gap else version - 1, tensors)
        begin = (in_flight, (manifest.encode(),))
        self._connection.begin()
        while True:
            name = f"v{version}-{uuid.uuid4().hex}"
            try:
                self._open()
                self._connection.send(PushBegin(name, *begin))
                return self._stream(name, tensors)
            except SessionLost:
                self._connection.drop()
            except BaseException:
                self._abort(name)
                raise

    def _stream(self, name: str, tensors: Mapping[str, Any]) -> int:
        state = self._state(name)
        sent = 0
        if not state.committed:
            for index, offset, data in chunks(tensors):
                self._connection.send(PushChunk(name, index, offset, (cast(Buffer, data),)))
                sent += 1
                while sent - state.received >= WINDOW:
                    state = self._state(name)
            self._connection.send(PushCommit(name))
        while not state.committed:
            state = self._state(name)
        return state.version

    def shutdown(self) -> None:
        """Asks the gateway to stop, waits until it says that it does and leaves, which the gateway waits for."""
        self._connection.begin()
        while True:
            try:
                self._open()
                self._connection.send(Shutdown())
                while not isinstance(self._next(), Stopping):
                    pass
                self._connection.drop()
                return
            except SessionLost:
                self._connection.drop()

    def close(self) -> None:
        """Frees the sockets."""
        self._connection.drop()

    def _open(self) -> None:
        if not self._connection.is_open:
            self._inbox.clear()
            self._connection.open()

    def _next(self) -> Message:
        while not self._inbox:
            self._inbox.extend(self._connection.receive(0.2))
        return self._inbox.popleft()

    def _state(self, name: str) -> PushState:
        while True:
            message = self._next()
            if isinstance(message, Refused) and message.about == name:
                raise refusal(message)
            if isinstance(message, PushState) and message.push == name:
                return message

    def _abort(self, name: str) -> None:
        try:
            self._connection.send(PushAbort(name))
        except SessionLost:
            self._connection.drop()
