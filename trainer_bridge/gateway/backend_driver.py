"""Calls the backend from a thread of its own, so that the gateway answers clients while an engine or a commit is slow.

Invariants:
- Every call to the backend after the gateway's start is made from this thread, one at a time.
- A commit with policy `finish` starts when no leased work is in flight; work submitted meanwhile waits behind it.
- A version is on disk before the backend is given it.
- Outputs are handed to the gateway in the order the backend returned them. The gateway bounds what is in flight.
- A backend that is held takes work and commits, and begins nothing. A commit with policy `finish` then waits until it goes on.
- When the driver ends, it cancels what the backend still has of its work: a backend may outlive its gateway. Holds and resets
  that it has not begun fail.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from ...errors import BlockrollError, ClusterError, StorageError
from ...rollout.backend import Completed, InterruptibleBackend, RolloutBackend
from ...rollout.types import RolloutRequest
from .driver_commands import (
    Abort,
    Cancel,
    Command,
    Commit,
    CommitEnded,
    Crashed,
    Event,
    Hold,
    Outputs,
    ResetPrefixCache,
    Revoke,
    Work,
    WorkRefused,
    refuse_interrupts,
)
from .progress_feed import ProgressFeed

_log = logging.getLogger(__package__)
POLL_S, IDLE_S, STATS_S = 0.02, 0.25, 0.5
"""Seconds of one poll with work in flight, of a wait without, and between two readings of the backend's figures."""


class BackendDriver:
    """Runs a backend from one thread. `version`, `stats`, `in_flight` and `notices` are snapshots anyone may read.

    Args:
        wake: called, from the driver's thread, after an event was put into `events`.

    Attributes:
        progress: tells listeners of this process what unfinished samples have made.
    """

    def __init__(self, backend: RolloutBackend, wake: Callable[[], None]) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.version, self.stats = backend.version, backend.stats()
        self._engines: list[Any] = backend.engines() if hasattr(backend, "engines") else []
        self._trouble: dict[str, str] = {}
        self._backend, self._wake = backend, wake
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._flight: dict[str, tuple[int, int, str]] = {}
        self._clients: Counter[str] = Counter()
        self._epochs: Counter[int] = Counter()
        self._samples = 0
        self._holding = False
        self.progress = ProgressFeed(backend)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._refreshed = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="blockroll-backend", daemon=True)
        self._thread.start()

    @property
    def in_flight(self) -> int:
        """Samples submitted and not yet returned."""
        return self._samples

    def in_flight_of(self) -> dict[str, int]:
        """Samples submitted and not yet returned, of each client that has any."""
        with self._lock:
            self._clients = +self._clients
            return dict(self._clients)

    def holds(self, epoch: int) -> bool:
        """Whether samples of this lease are submitted and not yet returned."""
        return epoch in self._epochs

    def engines(self) -> list[Any]:
        """What is known of each engine (`EngineStatus`); empty for a backend that does not say."""
        return self._engines

    def notices(self, waiting: bool) -> list[str]:
        """What the backend cannot do at present, one line each; that it takes no work, only while work is `waiting`."""
        return sorted(why for what, why in {**self._trouble}.items() if waiting or what != "submit")

    def submit(self, epoch: int, batch: Sequence[RolloutRequest], clients: Sequence[str]) -> None:
        """Queues leased requests for the backend; `clients` says whose each is. Returns at once; any thread may call it."""
        with self._lock:
            for request, client in zip(batch, clients, strict=True):
                self._forget(request.id)
                self._fly(request.id, epoch, request.samples, client)
        self._commands.put(Work(epoch, batch, clients))

    def scale(self, engines: int) -> None:
        """Sets how many engines the backend should have; any thread may call it. Raises ClusterError where it cannot."""
        scale = getattr(self._backend, "scale", None)
        if scale is None:
            raise ClusterError("engines: this backend has a fixed number of them")
        scale(engines)

    def commit(self, commit: Commit) -> None:
        """Queues a weight version for the backend; a CommitEnded event follows. Returns at once; any thread may call it."""
        self._commands.put(commit)

    def revoke(self, epoch: int) -> None:
        """Queues the end of a lease for the backend. Returns at once; any thread may call it."""
        self._commands.put(Revoke(epoch))

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Queues the end of some requests for the backend. Returns at once; any thread may call it."""
        with self._lock:
            self._commands.put(Cancel({name: self._flight[name][0] if name in self._flight else None for name in request_ids}))

    @property
    def holding(self) -> bool:
        """Whether the backend is held, or will be: the last call of `hold` said so."""
        return self._holding

    @property
    def interruptible(self) -> bool:
        """Whether the backend can be held, and can abort and relabel."""
        return isinstance(self._backend, InterruptibleBackend)

    def hold(self, held: bool) -> Future[None]:
        """Queues a hold for the backend, or its end. The result comes when the engines have stopped, or go on."""
        self._holding = held
        self._commands.put(command := Hold(held))
        return command.ended

    def abort(self, request_ids: Collection[str] | None) -> None:
        """Queues the end of some requests, or of all, whose samples come back as they are. Returns at once."""
        self._commands.put(Abort(request_ids))

    def reset_prefix_cache(self) -> Future[None]:
        """Queues that the backend forgets kept K/V. The result comes when it has."""
        self._commands.put(command := ResetPrefixCache())
        return command.ended

    def stop(self, timeout: float) -> bool:
        """Ends the thread after its current call to the backend; whether it ended within `timeout` seconds."""
        self._stop.set()
        self._commands.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        waiting: Commit | None = None
        held: list[Work] = []
        try:
            if isinstance(self._backend, InterruptibleBackend):
                self._backend.hold(False)  # a gateway before may have paused it
            while not self._stop.is_set():
                command = self._take(busy=waiting is not None or bool(self._samples))
                if isinstance(command, Commit):
                    waiting = command if self._sealed(command) else None
                elif isinstance(command, Revoke):
                    held = [work for work in held if work.epoch != command.epoch]
                    self._revoke(command.epoch)
                elif isinstance(command, Cancel):
                    held = [work.without(command.epochs) for work in held]
                    self._cancel(command.epochs)
                elif isinstance(command, Abort):
                    held = self._abort(command.request_ids, held)
                elif isinstance(command, Hold | ResetPrefixCache):
                    self._interrupt(command)
                elif command is not None and waiting is not None and waiting.in_flight == "finish":
                    held.append(command)
                elif command is not None:
                    self._submit(command)
                held_samples = sum(r.samples for w in held for r in w.batch)
                if waiting is not None and (waiting.in_flight != "finish" or self._samples <= held_samples):
                    self._commit(waiting)
                    waiting = None
                    for work in held:
                        if work.batch:
                            self._submit(work)
                    held.clear()
                self._collect()
            self._cancel(dict.fromkeys(self._flight))  # also what a command that was not taken would have ended
        except BaseException as error:
            # The gateway ends and raises it to its owner.
            self._tell(Crashed(error))
        finally:
            refuse_interrupts(self._commands)

    def _take(self, busy: bool) -> Command | None:
        try:
            return self._commands.get(timeout=0.0 if busy else IDLE_S)
        except queue.Empty:
            return None

    def _submit(self, work: Work) -> None:
        try:
            self._backend.submit(work.batch, work.epoch, work.clients)
            self._trouble.pop("submit", None)
        except ClusterError as error:
            _log.warning("lease %d is not taken by the cluster: %s", work.epoch, error)
            self._trouble["submit"] = str(error)
            with self._lock:
                for request in work.batch:
                    self._forget(request.id, work.epoch)
            self._tell(WorkRefused(work.epoch))

    def _sealed(self, commit: Commit) -> bool:
        """Writes a version to disk while samples in flight go on; False, and a CommitEnded event, when the disk refuses it."""
        try:
            with ThreadPoolExecutor(1, "blockroll-seal") as beside:
                sealing = beside.submit(commit.seal)
                while not wait([sealing], POLL_S).done:
                    self._collect()
                sealing.result()
        except StorageError as error:
            self._tell(CommitEnded(commit.version, error))
            return False
        return True

    def _revoke(self, epoch: int) -> None:
        with self._lock:
            for request_id in [name for name, (under, *_) in self._flight.items() if under == epoch]:
                self._forget(request_id)
        try:
            self._backend.revoke(epoch)
        except ClusterError as error:
            self._trouble["submit"] = str(error)

    def _cancel(self, epochs: Mapping[str, int | None]) -> None:
        with self._lock:
            for request_id, epoch in epochs.items():
                if epoch is not None:
                    self._forget(request_id, epoch)
        try:
            self._backend.cancel(list(epochs))
        except ClusterError as error:
            _log.warning("%d requests cannot be cancelled in the cluster: %s", len(epochs), error)

    def _abort(self, request_ids: Collection[str] | None, held: list[Work]) -> list[Work]:
        """Ends requests in the backend, and those of them in `held`, which it has not been given; returns what stays held."""
        assert isinstance(self._backend, InterruptibleBackend), "the gateway asks before"
        if ended := [item for work in held for item in work.aborted(request_ids)]:
            self._hand_out(ended)
        try:
            self._backend.abort(request_ids)
        except ClusterError as error:
            _log.warning("requests cannot be aborted in the cluster: %s", error)
        return [] if request_ids is None else [work.without(request_ids) for work in held]

    def _interrupt(self, command: Hold | ResetPrefixCache) -> None:
        assert isinstance(self._backend, InterruptibleBackend), "the gateway asks before"
        try:
            if isinstance(command, Hold):
                self._backend.hold(command.held)
            else:
                self._backend.reset_prefix_cache()
        except BaseException as error:
            command.ended.set_exception(error)
            if not isinstance(error, ClusterError):
                raise
        else:
            command.ended.set_result(None)
        self._wake()

    def _commit(self, commit: Commit) -> None:
        error: BlockrollError | None = None
        options: dict[str, Any] = {} if commit.in_flight == "finish" else {"in_flight": commit.in_flight}
        if getattr(self._backend, "takes_changes", False):
            options["changed"] = commit.changed
        try:
            if commit.arrays is not None:
                self._backend.commit_weights(commit.version, commit.arrays, **options)
            else:
                assert isinstance(self._backend, InterruptibleBackend), "the gateway asks before"
                self._backend.label_version(commit.version)
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
            if "poll" not in self._trouble:
                _log.warning("the cluster cannot be polled, trying again: %s", error)
            self._trouble["poll"] = str(error)
            self._stop.wait(IDLE_S)
            return
        self._trouble.pop("poll", None)
        self.progress.report()
        if completed:
            self._trouble.pop("submit", None)
            self._hand_out(completed)

    def _hand_out(self, completed: list[Completed]) -> None:
        # Told before they are subtracted: a gateway that drains must not see an empty flight without them.
        self._tell(Outputs(completed))
        with self._lock:
            for item in completed:
                epoch, left, client = self._flight.get(item.request_id, (0, 0, ""))
                if epoch == item.epoch:
                    self._forget(item.request_id)
                    if item.trajectory is not None and left > 1:
                        self._fly(item.request_id, epoch, left - 1, client)

    def _refresh(self) -> None:
        self.version, self.stats, self._refreshed = self._backend.version, self._backend.stats(), time.monotonic()
        if hasattr(self._backend, "engines"):
            self._engines = self._backend.engines()
            idle = [engine for engine in self._engines if engine.state in ("waiting", "lost")]
            self._trouble.pop("engines", None)
            if idle:
                self._trouble["engines"] = (f"{len(idle)} of {len(self._engines)} engines do not serve; engine {idle[0].id}: "
                                            f"{idle[0].reason}")

    def _forget(self, request_id: str, epoch: int | None = None) -> None:
        known = self._flight.get(request_id)
        if known is not None and epoch in (None, known[0]):
            self._samples -= known[1]
            self._clients[known[2]] -= known[1]
            self._epochs[known[0]] -= 1
            if not self._epochs[known[0]]:
                del self._epochs[known[0]]
            del self._flight[request_id]

    def _fly(self, request_id: str, epoch: int, samples: int, client: str) -> None:
        self._flight[request_id] = (epoch, samples, client)
        self._samples += samples
        self._clients[client] += samples
        self._epochs[epoch] += 1

    def _tell(self, event: Event) -> None:
        self.events.put(event)
        self._wake()
