"""The gateway's side of a weight push: one stage at a time, then one commit.

Invariants:
- Nothing reaches the backend before every digest is checked; whatever ends a stage early leaves no trace of it.
- A version follows the one that serves, or says that it skips; one that was committed is not committed again.
- A stage whose trainer fell silent gives way to the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import BlockrollError, TransportError
from .dispatch import BackendDriver, CommitEnded
from .ledger import Ledger
from .messages import Message, PushAbort, PushBegin, PushChunk, PushCommit, PushState, Refused
from .weights import ANY_PARENT, Manifest, WeightStager

REPORT_EVERY = 4
"""Chunks between two progress reports; below the sender's window."""


@dataclass
class _Stage:
    push: str
    peer: bytes
    client: str
    in_flight: str
    manifest: Manifest
    stager: WeightStager | None
    touched: float


class PushDesk:
    """Takes pushes of any control session; `reply(peer, message)` answers."""

    def __init__(self, expected: Mapping[str, tuple[str, tuple[int, ...]]], policies: tuple[str, ...],
                 driver: BackendDriver, ledger: Ledger, reply: Callable[[bytes, Message], None], idle: float) -> None:
        self._expected, self._policies, self._driver, self._ledger = expected, policies, driver, ledger
        self._reply, self._idle = reply, idle
        self._stage: _Stage | None = None
        self._committing: _Stage | None = None

    def handle(self, peer: bytes, client: str, message: PushBegin | PushChunk | PushCommit | PushAbort) -> None:
        """One message of a push; what is wrong with it is told to the peer."""
        try:
            if isinstance(message, PushBegin):
                self._begin(peer, client, message)
            elif isinstance(message, PushAbort):
                if self._stage is not None and self._stage.push == message.push:
                    self._stage = None
            else:
                stage = self._stage
                if stage is None or stage.push != message.push:
                    raise TransportError(f"push {message.push} is not staged; begin it again")
                if isinstance(message, PushChunk):
                    self._chunk(stage, message)
                else:
                    self._commit(stage)
        except BlockrollError as error:
            if self._stage is not None and self._stage.push == message.push:
                self._stage = None
            kind = "storage" if isinstance(error, OSError) else "transport"
            self._reply(peer, Refused(message.push, kind, str(error)[:1000]))

    def ended(self, event: CommitEnded) -> None:
        """The backend's answer to a commit."""
        stage, self._committing = self._committing, None
        if stage is None:
            return
        if event.error is None:
            self._reply(stage.peer, PushState(stage.push, 0, True, event.version))
        else:
            self._reply(stage.peer, Refused(stage.push, "cluster", event.error[:1000]))

    def expire(self, now: float) -> None:
        """Drops a stage nobody feeds."""
        if self._stage is not None and now - self._stage.touched > self._idle:
            self._stage = None

    def _begin(self, peer: bytes, client: str, message: PushBegin) -> None:
        if message.in_flight not in self._policies:
            raise TransportError(f"in_flight: this cluster does not offer {message.in_flight!r}; "
                                 f"use one of {', '.join(self._policies)}")
        manifest, serving = Manifest.decode(message.manifest[0]), self._driver.version
        stage = _Stage(message.push, peer, client, message.in_flight, manifest, None, time.monotonic())
        running = self._committing
        if running is not None:
            if running.manifest.digest != manifest.digest:
                raise TransportError(f"weight version {running.manifest.version} is being committed; "
                                     "push again after it")
            running.push, running.peer = message.push, peer
            return
        if manifest.version <= serving:
            if self._ledger.committed(manifest.version) != manifest.digest:
                raise TransportError(f"weight version {manifest.version} is not newer than {serving}, which serves, and "
                                     f"has other content; push version {serving + 1}")
            self._reply(peer, PushState(message.push, 0, True, serving))
            return
        if manifest.parent not in (ANY_PARENT, serving):
            raise TransportError(f"weight version {manifest.version} follows {manifest.parent}, but {serving} serves; "
                                 f"push version {serving + 1}, or allow a gap")
        other = self._stage
        if other is not None and other.client != client and time.monotonic() - other.touched < self._idle:
            raise TransportError(f"weight version {other.manifest.version} is being pushed by client {other.client!r}; "
                                 "push again when that is done")
        stage.stager = WeightStager(manifest, self._expected)
        self._stage = stage
        self._reply(peer, PushState(message.push, 0, False, serving))

    def _chunk(self, stage: _Stage, message: PushChunk) -> None:
        assert stage.stager is not None
        stage.touched = time.monotonic()
        stage.stager.add(message.index, message.offset, message.data[0])
        if stage.stager.received % REPORT_EVERY == 0:
            self._reply(stage.peer, PushState(stage.push, stage.stager.received, False, self._driver.version))

    def _commit(self, stage: _Stage) -> None:
        assert stage.stager is not None
        arrays = stage.stager.finish()
        # Remembered first: a repeat is recognised by it, and it counts for nothing while a smaller version serves.
        self._ledger.record_version(stage.manifest.version, stage.manifest.digest)
        self._stage, self._committing, stage.stager = None, stage, None
        self._driver.commit(stage.manifest.version, arrays, stage.in_flight)
