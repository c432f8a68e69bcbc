"""The gateway's side of a weight push: one stage at a time, then one commit, then one row of the ledger.

Invariants:
- Nothing reaches the backend before every digest is checked, every number is finite and the version is whole on disk; whatever
  ends a stage early leaves no trace of it.
- A version is committed when every engine has it and the ledger says so; only then is the trainer told, and only then are
  samples of the new version recorded. A gateway killed before that comes back at the version before, after it at the new one:
  the trainer, which pushes again what it was not told of, goes on from either.
- A version follows the last committed one, or says that it skips; one that was committed is not committed again.
- A stage whose trainer fell silent gives way to the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import BlockrollError, ClusterError, StorageError, TransportError
from .dispatch import BackendDriver, Commit, CommitEnded
from .kept import KeptVersions, VersionFile
from .ledger import Ledger
from .messages import Message, PushAbort, PushBegin, PushChunk, PushCommit, PushState, Refused
from .weights import ANY_PARENT, Manifest, WeightStager, without_tied_head

REPORT_EVERY = 4
"""Chunks between two progress reports; below the sender's window."""


@dataclass
class _Stage:
    """A push under way; `head` is the index of a tied head, whose bytes are dropped."""

    push: str
    peer: bytes
    client: str
    in_flight: str
    manifest: Manifest
    head: int
    stager: WeightStager
    file: VersionFile
    touched: float
    received: int = 0


class PushDesk:
    """Takes pushes of any control session; `reply(peer, message)` answers.

    Attributes:
        version: the last committed version.
        missing: why no engine can serve it, after a restart without its file; empty otherwise.
    """

    def __init__(self, expected: Mapping[str, tuple[str, tuple[int, ...]]], policies: tuple[str, ...],
                 driver: BackendDriver, ledger: Ledger, kept: KeptVersions, reply: Callable[[bytes, Message], None],
                 idle: float) -> None:
        self._expected, self._policies, self._driver, self._ledger = expected, policies, driver, ledger
        self._kept, self._reply, self._idle = kept, reply, idle
        self._stage: _Stage | None = None
        self._committing: _Stage | None = None
        self._taken = False
        self.version, self.missing = driver.version, ""

    @property
    def undecided(self) -> bool:
        """The engines have a version that the ledger does not know yet."""
        return self._taken

    def handle(self, peer: bytes, client: str, message: PushBegin | PushChunk | PushCommit | PushAbort) -> None:
        """One message of a push; what is wrong with it is told to the peer."""
        try:
            if isinstance(message, PushBegin):
                self._begin(peer, client, message)
            elif isinstance(message, PushAbort):
                self._drop(message.push)
            else:
                stage = self._stage
                if stage is None or stage.push != message.push:
                    raise TransportError(f"push {message.push} is not staged; begin it again")
                if isinstance(message, PushChunk):
                    self._chunk(stage, message)
                else:
                    self._commit(stage)
        except BlockrollError as error:
            self._drop(message.push)
            self._reply(peer, _refused(message.push, error))

    def ended(self, event: CommitEnded) -> None:
        """The backend's answer to a commit; one that went well is `undecided` until `settle` has recorded it."""
        stage = self._committing
        assert stage is not None and stage.manifest.version == event.version, "a commit nobody asked for ended"
        if event.error is None:
            self._taken = True
            return
        self._committing = None
        stage.file.discard()
        self._kept.sweep(self.version)
        self._reply(stage.peer, _refused(stage.push, event.error))

    def settle(self) -> None:
        """Makes the version the engines have taken the last committed one. Raises StorageError; then call it again."""
        stage = self._committing
        if stage is None or not self._taken:
            return
        self._ledger.record_version(stage.manifest.version, stage.manifest.digest)
        self._committing, self._taken = None, False
        self.version, self.missing = stage.manifest.version, ""
        self._kept.sweep(self.version)
        self._reply(stage.peer, PushState(stage.push, 0, True, self.version))

    def expire(self, now: float) -> None:
        """Drops a stage nobody feeds."""
        if self._stage is not None and now - self._stage.touched > self._idle:
            self._drop(self._stage.push)

    def close(self) -> None:
        """Drops what is staged."""
        if self._stage is not None:
            self._drop(self._stage.push)

    def _begin(self, peer: bytes, client: str, message: PushBegin) -> None:
        if message.in_flight not in self._policies:
            raise TransportError(f"in_flight: this cluster does not offer {message.in_flight!r}; "
                                 f"use one of {', '.join(self._policies)}")
        manifest, head = without_tied_head(Manifest.decode(message.manifest[0]), self._expected)
        running = self._committing
        if running is not None:
            if running.manifest.digest != manifest.digest:
                raise TransportError(f"weight version {running.manifest.version} is being committed; "
                                     "push again after it")
            running.push, running.peer = message.push, peer
            return
        if self._known(manifest):
            self._reply(peer, PushState(message.push, 0, True, self.version))
            return
        other = self._stage
        if other is not None and other.client != client and time.monotonic() - other.touched < self._idle:
            raise TransportError(f"weight version {other.manifest.version} is being pushed by client {other.client!r}; "
                                 "push again when that is done")
        self.close()
        stager = WeightStager(manifest, self._expected)
        self._stage = _Stage(message.push, peer, client, message.in_flight, manifest, head, stager,
                             self._kept.begin(manifest), time.monotonic())
        self._reply(peer, PushState(message.push, 0, False, self.version))

    def _known(self, manifest: Manifest) -> bool:
        """Whether this version serves or served already; raises TransportError for one that cannot be next."""
        version, last = manifest.version, self.version
        if version <= last and self._ledger.committed(version) != manifest.digest:
            raise TransportError(f"weight version {version} is not newer than {last}, which was committed, and has other "
                                 f"content; push version {last + 1}")
        if version < last or (version == last and not self.missing):
            return True
        if version > last and manifest.parent not in (ANY_PARENT, last):
            raise TransportError(f"weight version {version} follows {manifest.parent}, but {last} serves; "
                                 f"push version {last + 1}, or allow a gap")
        return False

    def _chunk(self, stage: _Stage, message: PushChunk) -> None:
        stage.touched = time.monotonic()
        stage.received += 1
        if message.index != stage.head:
            index = message.index - (0 <= stage.head < message.index)
            stage.stager.add(index, message.offset, message.data[0])
            stage.file.write(message.data[0])
        if stage.received % REPORT_EVERY == 0:
            self._reply(stage.peer, PushState(stage.push, stage.received, False, self.version))

    def _commit(self, stage: _Stage) -> None:
        arrays = stage.stager.finish()
        self._stage, self._committing = None, stage
        self._driver.commit(Commit(stage.manifest.version, arrays, stage.in_flight, stage.file.seal))

    def _drop(self, push: str) -> None:
        """Ends the stage of this push, if there is one."""
        if self._stage is not None and self._stage.push == push:
            self._stage.file.discard()
            self._stage = None


def _refused(push: str, error: BlockrollError) -> Refused:
    kind = "storage" if isinstance(error, StorageError) else "cluster" if isinstance(error, ClusterError) else "transport"
    return Refused(push, kind, str(error)[:1000])
