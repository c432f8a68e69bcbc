"""Receives weight pushes: stages one version at a time, has the engines commit it, then records it in the ledger.

Invariants:
- The backend is given a version after every digest is checked, every number is finite and the whole version is on disk.
  A stage that ends before leaves nothing behind.
- The ledger's row of a version is what decides that the version serves. It is written when every engine has the
  version. After it the trainer is told, and samples of the version are recorded. A gateway killed before that row
  restarts at the version before, and at the new one after it; the trainer pushes again what it was not told of, and
  goes on from either.
- Tensors whose digest is that of the version that serves do not travel. They are in the engines, and in that version's file.
- A version follows the last committed one, or its manifest allows a gap. A version that was committed is not committed
  again.
- A version that is only another number for the weights that serve ends nothing and forgets no K/V. Its file is a copy. Where the
  weights are those of the policy's directory there is no file, and the ledger's digest is empty.
- A paused gateway takes pushes, but for policy `finish` while samples are held: they would not end.
- A gateway that drains stages nothing more. A commit that has begun ends: the gateway stops after it is recorded.
- A stage that receives no chunk for `idle` seconds is replaced by another client's push.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ...errors import BlockrollError, ClusterError, StorageError, TransportError
from ..wire.codec import clip
from ..wire.manifest import ANY_PARENT, Manifest
from ..wire.messages import PushAbort, PushBegin, PushChunk, PushCommit, PushLabel, PushNeeds, PushState, Refused
from .backend_driver import BackendDriver
from .driver_commands import Commit, CommitEnded
from .kept_versions import KeptVersions, VersionFile
from .ledger import Ledger
from .restored_version import OF_THE_POLICY
from .sessions import Sessions
from .weight_stager import WeightStager, without_tied_head

_log = logging.getLogger(__package__)
REPORT_EVERY = 4
"""Chunks between two progress reports; fewer than the sender's window."""


@dataclass
class _Stage:
    """A push under way. `head`: index of a tied head in the client's manifest, which is not needed; -1 without one. `base`: the
    manifest of the version that serves, where tensors are taken from it. `touched`: when the last chunk came."""

    push: str
    peer: bytes
    client: str
    in_flight: str
    manifest: Manifest
    head: int
    base: Manifest | None
    needed: frozenset[str]
    stager: WeightStager
    file: VersionFile
    touched: float
    received: int = 0


@dataclass
class _Commit:
    """A version that is with the engines, and whom to tell. `file`: None where there is none (OF_THE_POLICY)."""

    push: str
    peer: bytes
    version: int
    digest: bytes
    file: VersionFile | None

    def seal(self) -> None:
        if self.file is not None:
            self.file.seal()


class WeightReceiver:
    """Handles the push messages of every control session.

    Args:
        expected: name -> (dtype, shape) of the policy's tensors.
        policies: what the cluster can do with sequences in flight at a commit.
        idle: seconds without a chunk after which another client's push may take over.
        room: `room_for_weights` of the backend, if it has that.

    Attributes:
        version: the version that was committed last.
        missing: why the engines cannot serve it, after a restart without its file; empty otherwise.
        draining: no push is begun any more; set when an operator asks for a drain.
    """

    def __init__(self, expected: Mapping[str, tuple[str, tuple[int, ...]]], policies: tuple[str, ...],
                 driver: BackendDriver, ledger: Ledger, kept: KeptVersions, sessions: Sessions, idle: float, version: int,
                 missing: str, room: Callable[..., Mapping[str, np.ndarray] | None] | None = None) -> None:
        self._expected, self._policies, self._driver, self._ledger = expected, policies, driver, ledger
        self._kept, self._sessions, self._idle, self._room = kept, sessions, idle, room
        self._stage: _Stage | None = None
        self._committing: _Commit | None = None
        self._taken = self.draining = False
        self.version, self.missing = version, missing

    @property
    def busy(self) -> bool:
        """Whether a version is being committed, and its sender was not told how that ended."""
        return self._committing is not None

    @property
    def undecided(self) -> bool:
        """Whether the engines have a version that the ledger has not recorded."""
        return self._taken

    def handle(self, peer: bytes, client: str, message: PushBegin | PushChunk | PushCommit | PushAbort | PushLabel) -> None:
        """Acts on one message of a push. The peer is told why a push is refused."""
        try:
            if isinstance(message, PushBegin):
                self._begin(peer, client, message)
            elif isinstance(message, PushLabel):
                self._label(peer, message)
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
            _log.info("push %s of client %s is refused: %s", message.push, client, error)
            self._drop(message.push)
            self._sessions.reply(peer, _refused(message.push, error))

    def ended(self, event: CommitEnded) -> None:
        """The backend has ended a commit. A version the engines have taken is `undecided` until `settle` has recorded
        it."""
        commit = self._committing
        assert commit is not None and commit.version == event.version, "a commit ended that was not begun here"
        if event.error is None:
            self._taken = True
            return
        _log.warning("weight version %d is not committed: %s", event.version, event.error)
        self._committing = None
        if commit.file is not None:
            commit.file.discard()
        self._kept.sweep(self.version)
        self._sessions.reply(commit.peer, _refused(commit.push, event.error))

    def settle(self) -> None:
        """Records the version that the engines have taken; from then on it serves. On StorageError call it again."""
        commit = self._committing
        if commit is None or not self._taken:
            return
        self._ledger.record_version(commit.version, commit.digest)
        self._committing, self._taken = None, False
        self.version, self.missing = commit.version, ""
        self._kept.sweep(self.version)
        _log.info("weight version %d is committed", self.version)
        self._sessions.reply(commit.peer, PushState(commit.push, 0, True, self.version))

    def expire(self, now: float) -> None:
        """Drops a stage that has received no chunk for `idle` seconds."""
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
            if running.digest != manifest.digest:
                raise TransportError(f"weight version {running.version} is being committed; push again after it")
            running.push, running.peer = message.push, peer
            return
        if self._known(manifest):
            self._sessions.reply(peer, PushState(message.push, 0, True, self.version))
            return
        if self.draining:
            raise TransportError(f"weight version {manifest.version} is not taken: the service drains and stops; push it again "
                                 "when the service is back")
        self._check_pause(message.in_flight)
        other = self._stage
        if other is not None and other.client != client and time.monotonic() - other.touched < self._idle:
            raise TransportError(f"weight version {other.manifest.version} is being pushed by client {other.client!r}; "
                                 "push again when that is done")
        self.close()
        # Tensors of a version that the engines could not be given are not there, whatever lies on disk.
        base = None if self.missing else self._kept.manifest(self.version, self._ledger.committed(self.version))
        have = set(() if base is None else base.tensors)
        needed = frozenset(spec.name for spec in manifest.tensors if spec not in have)
        stager = WeightStager(manifest, self._expected, needed, self._room)
        file = self._kept.begin(manifest, base, self._expected.keys() - needed)
        self._stage = _Stage(message.push, peer, client, message.in_flight, manifest, head, base, needed, stager, file,
                             time.monotonic())
        flags = bytearray(spec.name in needed for spec in manifest.tensors)
        if head >= 0:
            flags.insert(head, 0)
        self._sessions.reply(peer, PushNeeds(message.push, (bytes(flags),)))

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
        if message.index == stage.head:
            raise TransportError(f"push {message.push} sends the tied head, which is not needed")
        index = message.index - (0 <= stage.head < message.index)
        stage.stager.add(index, message.offset, message.data[0])
        stage.file.write(index, message.offset, message.data[0])
        if stage.received % REPORT_EVERY == 0:
            self._sessions.reply(stage.peer, PushState(stage.push, stage.received, False, self.version))

    def _commit(self, stage: _Stage) -> None:
        self._check_pause(stage.in_flight)
        arrays = stage.stager.finish()
        if stage.base is not None:
            arrays |= self._kept.mapped(stage.base, self._expected.keys() - stage.needed)
        commit = _Commit(stage.push, stage.peer, stage.manifest.version, stage.manifest.digest, stage.file)
        self._stage, self._committing = None, commit
        changed = None if stage.base is None else stage.needed
        self._driver.commit(Commit(commit.version, arrays, stage.in_flight, commit.seal, changed))

    def _label(self, peer: bytes, message: PushLabel) -> None:
        """Begins to give the weights that serve another version number."""
        version = message.version
        if version == self.version and not self.missing:
            self._sessions.reply(peer, PushState(message.push, 0, True, version))
            return
        if version < self.version:
            raise TransportError(f"weight version {version} is less than {self.version}, which serves; versions only grow")
        if self.missing or self._committing is not None or self._stage is not None or self.draining:
            why = self.missing or ("the service drains" if self.draining else "another version is being pushed")
            raise TransportError(f"weight version {version} cannot be a new label now: {why}")
        if not self._driver.interruptible:
            raise ClusterError("this cluster cannot label its weights; push the version instead")
        digest = self._ledger.committed(self.version)
        base = self._kept.manifest(self.version, digest)
        if base is None and digest:
            raise StorageError(f"the file of weight version {self.version} cannot be read; push version {version} instead")
        commit = _Commit(message.push, peer, version, OF_THE_POLICY, None)
        if base is not None:
            manifest = Manifest(version, self.version, base.tensors)
            commit.digest = manifest.digest
            commit.file = self._kept.begin(manifest, base, [spec.name for spec in base.tensors])
        self._committing = commit
        self._driver.commit(Commit(version, None, "keep", commit.seal))

    def _check_pause(self, in_flight: str) -> None:
        if in_flight == "finish" and self._driver.holding and self._driver.in_flight:
            raise ClusterError(f"in_flight: the service is paused and holds {self._driver.in_flight} samples, which cannot "
                               "finish; use keep, recompute or abort, or resume first")

    def _drop(self, push: str) -> None:
        """Ends the stage of this push, if there is one."""
        if self._stage is not None and self._stage.push == push:
            self._stage.file.discard()
            self._stage = None


def _refused(push: str, error: BlockrollError) -> Refused:
    kind = "storage" if isinstance(error, StorageError) else "cluster" if isinstance(error, ClusterError) else "transport"
    return Refused(push, kind, clip(str(error)))
