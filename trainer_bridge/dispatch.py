"""The thread that talks to the backend, so that a slow engine or a long commit never silences the gateway.

Invariants:
- Every call to the backend after the start is made here, one at a time.
- A commit with policy `finish` starts when no leased work is in flight; work submitted meanwhile waits behind it.
- A version is on disk before the backend is given it.
- What the backend returns is handed on in the order it came; what is in flight is bounded by who submits.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import BlockrollError, ClusterError, StorageError
from ..rollout.backend import Completed, RolloutBackend
from ..rollout.types import RolloutRequest

POLL_S, IDLE_S, STATS_S = 0.02, 0.25, 0.5


@dataclass(frozen=True)
class Work:
    """A leased batch to run."""

    epoch: int
    batch: Sequence[RolloutRequest]


@dataclass(frozen=True)
class Commit:
    """A complete weight version to commit, after `seal` has brought it to disk."""

    version: int
    arrays: Mapping[str, np.ndarray]
    in_flight: str
    seal: Callable[[], None]


@dataclass(frozen=True)
class Revoke:
    """A lease that is over: what it holds is not waited for."""

    epoch: int


@dataclass(frozen=True)
class Outputs:
    """What engines finished."""

    completed: list[Completed]


@dataclass(frozen=True)
class WorkRefused:
    """The backend took nothing of this lease."""

    epoch: int


@dataclass(frozen=True)
class CommitEnded:
    """A commit is over; `error` is None when every engine has the version."""

    version: int
    error: BlockrollError | None


@dataclass(frozen=True)
class Crashed:
    """The backend raised something that is no ClusterError: a bug, or an interrupt."""

    error: BaseException


Event = Outputs | WorkRefused | CommitEnded | Crashed


class BackendDriver:
    """Runs a backend from one thread. `version`, `stats`, `in_flight` and `notices` are snapshots anyone may read.

    Args:
        wake: called, from the driver's thread, after an event was put into `events`.
    """

    def __init__(self, backend: RolloutBackend, wake: Callable[[], None]) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.version, self.stats = backend.version, backend.stats()
        self._trouble: dict[str, str] = {}
        self._backend, self._wake = backend, wake
        self._commands: queue.SimpleQueue[Work | Commit | Revoke | None] = queue.SimpleQueue()
        self._flight: dict[str, tuple[int, int]] = {}
        self._samples = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._refreshed = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="blockroll-backend", daemon=True)
        self._thread.start()

    @property
    def in_flight(self) -> int:
        """Samples submitted and not yet returned."""
        return self._samples

    def notices(self) -> list[str]:
        """What the backend cannot do at present, one line each."""
        return sorted({**self._trouble}.values())

    def submit(self, epoch: int, batch: Sequence[RolloutRequest]) -> None:
        """Hands a leased batch on; from any thread, at once."""
        with self._lock:
            for request in batch:
                self._forget(request.id)
                self._flight[request.id] = (epoch, request.samples)
                self._samples += request.samples
        self._commands.put(Work(epoch, batch))

    def commit(self, commit: Commit) -> None:
        """Hands a weight version on; from any thread, at once. Ends with a CommitEnded event."""
        self._commands.put(commit)

    def revoke(self, epoch: int) -> None:
        """Gives a lease up; from any thread, at once."""
        self._commands.put(Revoke(epoch))

    def stop(self, timeout: float) -> bool:
        """Ends the thread after the call it is in; whether it ended in time."""
        self._stop.set()
        self._commands.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        waiting: Commit | None = None
        held: list[Work] = []
        try:
            while not self._stop.is_set():
                command = self._take(busy=waiting is not None or bool(self._samples))
                if isinstance(command, Commit):
                    waiting = command if self._sealed(command) else None
                elif isinstance(command, Revoke):
                    held = [work for work in held if work.epoch != command.epoch]
                    self._revoke(command.epoch)
                elif command is not None and waiting is not None and waiting.in_flight == "finish":
                    held.append(command)
                elif command is not None:
                    self._submit(command)
                held_samples = sum(r.samples for w in held for r in w.batch)
                if waiting is not None and (waiting.in_flight != "finish" or self._samples <= held_samples):
                    self._commit(waiting)
                    waiting = None
                    for work in held:
                        self._submit(work)
                    held.clear()
                self._collect()
        except BaseException as error:
            # Handed to the gateway, which ends and raises it to its owner.
            self._tell(Crashed(error))

    def _take(self, busy: bool) -> Work | Commit | Revoke | None:
        try:
            return self._commands.get(timeout=0.0 if busy else IDLE_S)
        except queue.Empty:
            return None

    def _submit(self, work: Work) -> None:
        try:
            self._backend.submit(work.batch, work.epoch)
            self._trouble.pop("submit", None)
        except ClusterError as error:
            self._trouble["submit"] = str(error)
            with self._lock:
                for request in work.batch:
                    self._forget(request.id, work.epoch)
            self._tell(WorkRefused(work.epoch))

    def _sealed(self, commit: Commit) -> bool:
        """Brings a version to disk while samples in flight go on; one that the disk refuses ends here."""
        try:
            commit.seal()
        except StorageError as error:
            self._tell(CommitEnded(commit.version, error))
            return False
        return True

    def _revoke(self, epoch: int) -> None:
        with self._lock:
            for request_id in [name for name, (under, _) in self._flight.items() if under == epoch]:
                self._forget(request_id)
        try:
            self._backend.revoke(epoch)
        except ClusterError as error:
            self._trouble["submit"] = str(error)

    def _commit(self, commit: Commit) -> None:
        error: BlockrollError | None = None
        try:
            if commit.in_flight == "finish":
                self._backend.commit_weights(commit.version, commit.arrays)
            else:
                self._backend.commit_weights(commit.version, commit.arrays, in_flight=commit.in_flight)  # type: ignore[call-arg]
        except ClusterError as failure:
            error = failure
        self._refresh()
        self._tell(CommitEnded(commit.version, error))

    def _collect(self) -> None:
        try:
            completed = self._backend.poll(POLL_S if self._samples else 0.0)
            if time.monotonic() - self._refreshed > STATS_S:
                self._refresh()
        except ClusterError as error:
            self._trouble["poll"] = str(error)
            self._stop.wait(IDLE_S)
            return
        self._trouble.pop("poll", None)
        if completed:
            with self._lock:
                for item in completed:
                    epoch, left = self._flight.get(item.request_id, (0, 0))
                    if epoch == item.epoch:
                        self._forget(item.request_id)
                        if item.trajectory is not None and left > 1:
                            self._flight[item.request_id] = (epoch, left - 1)
                            self._samples += left - 1
            self._tell(Outputs(completed))

    def _refresh(self) -> None:
        self.version, self.stats, self._refreshed = self._backend.version, self._backend.stats(), time.monotonic()

    def _forget(self, request_id: str, epoch: int | None = None) -> None:
        known = self._flight.get(request_id)
        if known is not None and epoch in (None, known[0]):
            self._samples -= known[1]
            del self._flight[request_id]

    def _tell(self, event: Event) -> None:
        self.events.put(event)
        self._wake()
