"""The service's end of the bridge: one thread that owns the socket and the ledger, one that talks to the cluster.

Invariants:
- A request is acknowledged after the ledger has it, a trajectory is sent after the ledger has it, and sent again in every
  new session of its client until the client acknowledges it.
- A batch reaches the cluster whole, in one call, under one epoch; outputs of another epoch are refused by the ledger.
- Memory is bounded: payloads stay in the ledger until the client's credit asks for them, at most `max_in_flight` samples
  are with the cluster (one batch may exceed it), and a peer that does not read is forgotten.
- The service comes back at the weight version it committed last (`kept`). Where that cannot be had, it hands out no work, says
  so in its notice and waits for a push of that version or the next one; submissions and deliveries go on.
- A full disk or a cluster without engines stops the work that needs it, is told to clients as a notice, and is retried;
  with `disk_patience` a disk that stays full for so long ends the gateway.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import zmq

from ..errors import ClusterError, StorageError
from ..rollout.backend import Completed, RolloutBackend
from .dispatch import BackendDriver, CommitEnded, Crashed, Outputs, WorkRefused
from .kept import KeptVersions
from .keys import ServerKeys
from .ledger import KEEP, Ledger
from .messages import TO_GATEWAY
from .pushes import PushDesk
from .sessions import Figures, Sessions
from .transport import Router

RETRY_S, FULL_S, IDLE_S, FAREWELL_S = 0.5, 0.02, 0.25, 3.0
BURST = 64
"""Messages read before the other work has its turn."""


class Gateway:
    """Serves a cluster to trainers.

    Args:
        cluster: the backend; it is not closed by the gateway.
        address: `tcp://HOST:PORT` (port `*` for any free one) or `ipc://PATH`; beyond loopback only with `keys`.
        ledger_path: SQLite file of the ledger; made if missing, resumed if not. The weight version that serves is kept beside
            it, in `LEDGER_PATH.weights-V`.
        keys: the gateway's CURVE pair and the public keys it admits.
        max_in_flight: samples leased to the cluster at once.
        max_ledger_bytes: size the ledger may reach, without the weights; None for what the disk holds.
        keep_requests: wholly acknowledged requests that are remembered, to recognise them when they are submitted again.
        lease_seconds: lease work again, under a new epoch, when no sample of a lease has come for so long; the engines that
            hold it are given up. Longer than the longest sample takes; loading an engine does not count. None never.
        push_idle_seconds: a weight push without a chunk for so long gives way to another one.
        disk_patience: seconds a ledger that cannot be written is waited for; None for ever.
    """

    def __init__(self, cluster: RolloutBackend, address: str, ledger_path: str | Path, *,
                 keys: ServerKeys | None = None, max_in_flight: int = 4096, max_ledger_bytes: int | None = None,
                 keep_requests: int = KEEP, lease_seconds: float | None = None, push_idle_seconds: float = 60.0,
                 disk_patience: float | None = None) -> None:
        self._cluster, self._bind, self._path, self._keys = cluster, address, ledger_path, keys
        self._max_in_flight, self._max_bytes, self._keep = max_in_flight, max_ledger_bytes, keep_requests
        self._lease_seconds, self._push_idle = lease_seconds, push_idle_seconds
        self._disk_patience = disk_patience
        self._refused: dict[str, float] = {}
        self._unrecorded: list[Completed] = []
        self._leases: dict[int, float] = {}
        self._revoked: set[int] = set()
        self._trouble: dict[str, str] = {}
        self._retry: dict[str, float] = {}
        self._stopping = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def start(self) -> Self:
        """Opens the ledger, binds, serves. Raises StorageError, TransportError or ClusterError."""
        expected = dict(self._cluster.expected_weights())
        policies = tuple(getattr(self._cluster, "in_flight_policies", ("finish",)))
        with ExitStack() as undo:
            self._ledger = Ledger(self._path, max_bytes=self._max_bytes, keep=self._keep)
            undo.callback(self._ledger.close)
            self._router = Router(self._bind, self._keys, TO_GATEWAY)
            undo.callback(self._router.close, 0.0)
            kept = KeptVersions(self._path)
            missing = self._restore(kept, expected)
            self._wake_in, self._wake_out = socket.socketpair()
            undo.callback(self._wake_in.close)
            undo.callback(self._wake_out.close)
            self._wake_in.setblocking(False)
            self._wake_out.setblocking(False)
            self._driver = BackendDriver(self._cluster, self._wake)
            undo.callback(self._driver.stop, 30.0)
            self._sessions = Sessions(self._router, self._ledger, lambda: self._desk.version, self._notice, self._figures)
            self._desk = PushDesk(expected, policies, self._driver, self._ledger, kept, self._sessions.reply,
                                  self._push_idle)
            if missing:
                self._desk.version, self._desk.missing = missing
            self._sessions.desk = self._desk
            thread = threading.Thread(target=self._run, name="blockroll-gateway", daemon=True)
            thread.start()
            self._thread = thread
            undo.pop_all()
        return self

    def _restore(self, kept: KeptVersions, expected: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[int, str] | None:
        """Brings the cluster to the version committed last; that version and why it cannot, where it cannot."""
        last = self._ledger.last_version()
        kept.sweep(None if last is None else last[0])
        if last is None or last[0] == self._cluster.version:
            return None
        try:
            self._cluster.commit_weights(last[0], kept.load(*last, expected))
        except (StorageError, ClusterError) as error:
            return last[0], (f"no work is handed out: weight version {last[0]} was committed last and cannot be served; push "
                             f"version {last[0]} again, or version {last[0] + 1} ({error})")
        return None

    @property
    def address(self) -> str:
        """The address clients connect to, with the port that was bound."""
        return self._router.address

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until the gateway ends (a Shutdown, or a failure, which is raised); whether it did."""
        assert self._thread is not None, "wait() before start()"
        self._thread.join(timeout)
        if self._error is not None:
            raise self._error
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Ends serving; unfinished and unacknowledged work stays in the ledger. Raises what made the gateway fail."""
        self._stopping = True
        if self._thread is not None:
            self._wake()
            self.wait()

    def __enter__(self) -> Self:
        return self if self._thread is not None else self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.stop()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router.socket, zmq.POLLIN)
        poller.register(self._wake_in.fileno(), zmq.POLLIN)
        try:
            waiting = False
            while not self._stopping:
                poller.poll(int(1000 * (FULL_S if waiting else IDLE_S)))
                waiting = self._turn()
            self._farewell(self._sessions.stopping)
        except BaseException as error:
            # Kept for wait() and stop(), which raise it to the gateway's owner.
            self._error = error
            kind = "storage" if isinstance(error, StorageError) else "cluster"
            why = str(error) if kind == "storage" else f"the gateway failed: {type(error).__name__}: {error}"
            self._farewell(lambda: self._sessions.fail(kind, why))
        finally:
            self._driver.stop(30.0)
            self._desk.close()
            self._router.close(5.0)
            self._ledger.close()
            with self._lock:
                self._wake_in.close()
                self._wake_out.close()

    def _farewell(self, tell: Callable[[], int]) -> None:
        """Says a last word until all it concerns have left, as who heard it does; `tell` says it and counts them.

        What is still on its way when a connection ends may be lost, with `linger` and without: bytes nobody read reset
        it, and a reset discards what the peer has not read yet. So what they send is read to the end.
        """
        deadline = time.monotonic() + FAREWELL_S
        while tell() and time.monotonic() < deadline:
            self._router.socket.poll(int(1000 * FULL_S))
            while self._router.receive() is not None:
                pass

    def _turn(self) -> bool:
        """One round of everything there is to do; whether something waits for a full peer or the disk."""
        with suppress(BlockingIOError):
            self._wake_in.recv(4096)
        for _ in range(BURST):
            inbound = self._router.receive()
            if inbound is None:
                break
            self._sessions.receive(inbound)
        now = time.monotonic()
        waiting = self._collect(now)
        self._expire(now)
        self._dispatch(now)
        self._stopping = self._stopping or self._sessions.shutdown
        try:
            waiting |= self._sessions.work(now)
            self._worked("send")
        except StorageError as error:
            self._failed("send", error, now)
        if self._sessions.trouble is not None:
            self._failed("acknowledge", self._sessions.trouble, now)
        else:
            self._worked("acknowledge")
        return waiting

    def _collect(self, now: float) -> bool:
        """Takes what the cluster has to say; outputs the disk refused are kept and tried again."""
        while not self._driver.events.empty():
            event = self._driver.events.get()
            if isinstance(event, Outputs):
                self._unrecorded.extend(event.completed)
                self._leases.update({item.epoch: now for item in event.completed if item.epoch in self._leases})
            elif isinstance(event, CommitEnded):
                self._desk.ended(event)
            elif isinstance(event, WorkRefused):
                self._revoked.add(event.epoch)
                self._retry["dispatch"] = now + RETRY_S
            elif isinstance(event, Crashed):
                raise event.error
        if self._desk.undecided and now >= self._retry.get("commit", 0.0):
            try:
                self._desk.settle()
            except StorageError as error:
                self._failed("commit", error, now)
            else:
                self._worked("commit")
        if self._unrecorded and not self._desk.undecided and now >= self._retry.get("record", 0.0):
            try:
                self._sessions.mark(self._ledger.record(self._unrecorded))
            except StorageError as error:
                self._failed("record", error, now)
            else:
                self._unrecorded.clear()
                self._worked("record")
        return bool(self._unrecorded) or self._desk.undecided

    def _dispatch(self, now: float) -> None:
        """Leases queued batches while there is room; what stays queued is in the ledger alone."""
        if now < self._retry.get("dispatch", 0.0) or self._unrecorded or self._desk.undecided or self._desk.missing:
            return
        try:
            for epoch in sorted(self._revoked):
                self._ledger.release(epoch)
                self._driver.revoke(epoch)
                self._revoked.remove(epoch)
                self._leases.pop(epoch, None)
            while self._driver.in_flight < self._max_in_flight:
                leased = self._ledger.lease(self._max_in_flight - self._driver.in_flight, self._driver.in_flight == 0)
                if leased is None:
                    break
                self._leases[leased[0]] = now
                self._driver.submit(*leased)
            self._worked("dispatch")
        except StorageError as error:
            self._failed("dispatch", error, now)

    def _expire(self, now: float) -> None:
        self._desk.expire(now)
        if not self._driver.in_flight:
            self._leases.clear()
        if self._driver.stats.get("loading"):
            self._leases = dict.fromkeys(self._leases, now)
        late = {e for e, since in self._leases.items() if self._lease_seconds and now - since > self._lease_seconds}
        if late - self._revoked:
            self._revoked |= late
            # The others may have waited behind those.
            self._leases = dict.fromkeys(self._leases, now)

    def _failed(self, what: str, error: StorageError, now: float) -> None:
        self._trouble[what], self._retry[what] = str(error), now + RETRY_S
        since = self._refused.setdefault(what, now)
        if self._disk_patience is not None and now - since > self._disk_patience:
            raise error

    def _worked(self, what: str) -> None:
        self._trouble.pop(what, None)
        self._refused.pop(what, None)

    def _wake(self) -> None:
        # A pipe that is full is full of wake-ups already.
        with self._lock, suppress(BlockingIOError):
            if self._wake_out.fileno() >= 0:
                self._wake_out.send(b"!")

    def _notice(self) -> str:
        """What keeps the service from working, in one line of at most 1000 characters."""
        return "; ".join(filter(None, [self._desk.missing, *self._trouble.values(), *self._driver.notices()]))[:1000]

    def _figures(self) -> Figures:
        counters, (size, free) = self._ledger.counters, self._ledger.size()
        return {
            "version": self._desk.version, "in_flight": self._driver.in_flight, "sessions": len(self._sessions),
            "requested": counters.requested, "unique": counters.unique, "duplicates": counters.duplicates,
            "missing": counters.missing, "failed": counters.failed, "acknowledged": counters.acknowledged,
            "stale": counters.stale, "malformed": self._sessions.malformed, "notice": self._notice(),
            "ledger_bytes": size, "ledger_free_bytes": free, "ledger_kept": counters.kept,
            **{f"engine.{name}": value for name, value in self._driver.stats.items()},
        }
