"""Pushes weight versions over a control session.

Invariants:
- A push ends in one of two ways: the version serves on every engine, or an exception is raised and the old version
  serves.
- Only tensors that the gateway asks for travel: those it has not from the version that serves.
- When the connection or the gateway is lost in the middle of a push, the push begins again. The
  gateway recognises a version it has committed by its digest and does not commit it twice.
"""

from __future__ import annotations

import logging
import uuid
from collections import deque
from collections.abc import Mapping
from typing import Any, cast

from ...errors import TransportError
from ..wire.codec import Buffer
from ..wire.manifest import ANY_PARENT
from ..wire.messages import (
    Message,
    PushAbort,
    PushBegin,
    PushChunk,
    PushCommit,
    PushLabel,
    PushNeeds,
    PushState,
    Refused,
)
from .connection import Connection, SessionLost, refusal
from .host_weights import HostWeights

_log = logging.getLogger(__package__)
WINDOW = 16
"""Chunks that may be sent before the gateway has reported them staged."""


class WeightPusher:
    """Pushes over `connection`, which opens control sessions. One thread at a time."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._inbox: deque[Message] = deque()

    def push(self, version: int, tensors: Mapping[str, Any], *, allow_gap: bool, in_flight: str) -> int:
        """Pushes and commits a version; returns the version that serves. See RolloutClient.push_weights."""
        weights = HostWeights.copy_of(tensors)
        weights.check_finite()
        manifest = weights.manifest(version, ANY_PARENT if allow_gap else version - 1).encode()
        self._connection.restart_timeout()
        while True:
            name = f"v{version}-{uuid.uuid4().hex}"
            try:
                self._open()
                self._connection.send(PushBegin(name, in_flight, (manifest,)))
                return self._stream(name, weights)
            except SessionLost:
                _log.info("push of weight version %d: the session broke; beginning again", version)
                self._connection.drop()
            except BaseException:
                self._abort(name)
                raise

    def label(self, version: int) -> int:
        """Gives the weights that serve another version number; returns the version that serves."""
        self._connection.restart_timeout()
        while True:
            name = f"label-{version}-{uuid.uuid4().hex}"
            try:
                self._open()
                self._connection.send(PushLabel(name, version))
                return self._state(name).version
            except SessionLost:
                _log.info("label of weight version %d: the session broke; asking again", version)
                self._connection.drop()

    def _stream(self, name: str, weights: HostWeights) -> int:
        """Sends every chunk, commits, and waits until the version serves."""
        state = self._news(name)
        if isinstance(state, PushNeeds):
            if len(state.needed[0]) != len(weights.tensors):
                raise TransportError(f"the gateway asks for {len(state.needed[0])} tensors of {len(weights.tensors)}; "
                                     "start it with the same version of blockroll")
            received = 0
            for sent, (index, offset, data) in enumerate(weights.chunks(needed=state.needed[0]), 1):
                self._connection.send(PushChunk(name, index, offset, (cast(Buffer, data),)))
                while sent - received >= WINDOW:
                    received = self._state(name).received
            self._connection.send(PushCommit(name))
            state = self._state(name)
        while not state.committed:
            state = self._state(name)
        _log.info("weight version %d serves", state.version)
        return state.version

    def _open(self) -> None:
        if not self._connection.is_open:
            self._inbox.clear()
            self._connection.open()

    def _state(self, name: str) -> PushState:
        """The gateway's next report about this push. Raises what the gateway refused."""
        while not isinstance(message := self._news(name), PushState):
            pass
        return message

    def _news(self, name: str) -> PushState | PushNeeds:
        """What the gateway says next about this push. Raises what the gateway refused."""
        while True:
            while not self._inbox:
                self._inbox.extend(self._connection.receive(0.2))
            message = self._inbox.popleft()
            if isinstance(message, Refused) and message.about == name:
                raise refusal(message)
            if isinstance(message, PushState | PushNeeds) and message.push == name:
                return message

    def _abort(self, name: str) -> None:
        try:
            self._connection.send(PushAbort(name))
        except SessionLost:
            self._connection.drop()
