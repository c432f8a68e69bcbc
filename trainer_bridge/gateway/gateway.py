"""Serves a cluster to trainers, from one thread that owns the socket and the ledger. Another thread calls the cluster.

Invariants:
- A request is confirmed after the ledger has it. A trajectory is sent after the ledger has it, and sent again in every
  new session of its client until the client acknowledges it.
- Work is handed to the cluster under an epoch, and the ledger refuses outputs of another epoch. A cluster whose dispatch is
  ordered is handed batches whole, each in one call; another one requests, clients in turn.
- Memory is bounded: payloads stay in the ledger until the client's credit allows them to be sent, at most
  `max_in_flight` samples are with the cluster (one batch, or clients that have less than their share, may exceed it), and
  a peer that does not read loses its session.
- A restarted service serves the weight version it committed last (`kept_versions`). When that version cannot be read,
  the service hands out no work, says so in its notice, and waits for a push of that version or the next one.
  Submissions and deliveries go on.
- When the disk is full or the cluster has no engine, the work that needs it is tried again, and clients are told in a
  notice. With `disk_patience` the gateway ends when the disk stays full for so long. It ends at once where the disk fails to
  keep what it had taken.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import zmq

from ...errors import StorageError
from ...rollout.backend import Completed, RolloutBackend
from ...rollout.types import RolloutRequest
from ..wire.gateway_socket import GatewaySocket
from ..wire.keys import ServerKeys
from ..wire.limits import MAX_CLIENT_SAMPLES, MAX_REQUEST_SAMPLES, TO_GATEWAY
from .absent_clients import GRACE_S, AbsentClients
from .backend_driver import BackendDriver
from .driver_commands import CommitEnded, Crashed, Outputs, WorkRefused
from .gateway_status import GatewayStatus
from .generation_control import GenerationControl
from .kept_versions import KeptVersions
from .ledger import Ledger
from .message_router import MessageRouter
from .operations import Operations
from .options import check_options
from .progress_feed import ProgressFeed
from .restored_version import restore_version
from .retention import KEEP
from .sessions import Sessions
from .storage_retries import StorageRetries
from .weight_receiver import WeightReceiver

_log = logging.getLogger(__package__)
FULL_S, IDLE_S = 0.02, 0.25
"""Seconds between two rounds when something waits for a peer or the disk, and when nothing happens."""
FAREWELL_S = 3.0
"""Seconds for which a gateway that ends waits for the clients concerned to disconnect."""
LINGER_S = 5.0
"""Seconds that messages which are still queued then have to leave. A peer that never read holds up the end for all of them."""
BURST = 64
"""Messages read in one round before the other work."""


class Gateway:
    """Serves a cluster to trainers.

    Args: cluster: the backend; it is not closed by the gateway. address: `tcp://HOST:PORT` (port `*` for any free one)
        or `ipc://PATH`; beyond loopback only with `keys`. ledger_path: SQLite file of the ledger; made if missing,
        resumed if not. The weight version that serves is kept beside it, in `LEDGER_PATH.weights-V`. keys: the
        gateway's CURVE pair and the public keys it admits. max_in_flight: samples leased to the cluster at once.
        max_ledger_bytes: size the ledger may reach, without the weights; None for what the disk holds. keep_requests:
        wholly acknowledged requests the ledger remembers, so that it recognises them when submitted again.
        lease_seconds: when no sample of a lease has come for so long, the engines that hold it are given up and its
        work is leased again under a new epoch. Give more than the longest sample takes; loading an engine does not
        count. None: leases do not expire. push_idle_seconds: a weight push without a chunk for so long may be replaced
        by another client's push. disk_patience: seconds the ledger may be unwritable before the gateway ends; None for
        ever. client_grace: seconds a client may be gone before its unfinished work is paused until it is back; None for
        ever. max_request_samples, max_client_samples: most samples of one request, and unfinished ones of one client.
    """

    def __init__(self, cluster: RolloutBackend, address: str, ledger_path: str | Path, *,
                 keys: ServerKeys | None = None, max_in_flight: int = 4096, max_ledger_bytes: int | None = None,
                 keep_requests: int = KEEP, lease_seconds: float | None = None, push_idle_seconds: float = 60.0,
                 disk_patience: float | None = None, client_grace: float | None = GRACE_S,
                 max_request_samples: int = MAX_REQUEST_SAMPLES, max_client_samples: int = MAX_CLIENT_SAMPLES) -> None:
        check_options(
            cluster, address, ledger_path, keys,
            {"max_in_flight": (max_in_flight, 1, False), "max_ledger_bytes": (max_ledger_bytes, 1, True),
             "keep_requests": (keep_requests, 0, False), "max_request_samples": (max_request_samples, 1, False),
             "max_client_samples": (max_client_samples, 1, False)},
            {"lease_seconds": (lease_seconds, True), "push_idle_seconds": (push_idle_seconds, False),
             "disk_patience": (disk_patience, True), "client_grace": (client_grace, True)})
        self._cluster, self._bind, self._path, self._keys = cluster, address, ledger_path, keys
        self._max_in_flight, self._max_bytes, self._keep = max_in_flight, max_ledger_bytes, keep_requests
        self._lease_seconds, self._push_idle, self._grace = lease_seconds, push_idle_seconds, client_grace
        self._max_samples = {"max_request_samples": max_request_samples, "max_client_samples": max_client_samples}
        self._retries = StorageRetries(disk_patience)
        self._unrecorded: list[Completed] = []
        self._leases: dict[int, float] = {}
        self._revoked: set[int] = set()
        self._stopping = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def start(self) -> Self:
        """Opens the ledger, binds, serves. Raises StorageError, TransportError or ClusterError."""
        expected = dict(self._cluster.expected_weights())
        policies = tuple(getattr(self._cluster, "in_flight_policies", ("finish",)))
        with ExitStack() as undo:
            self._ledger = Ledger(self._path, max_bytes=self._max_bytes, keep=self._keep, **self._max_samples)
            undo.callback(self._ledger.close)
            self._socket = GatewaySocket(self._bind, self._keys, TO_GATEWAY)
            undo.callback(self._socket.close, 0.0)
            kept = KeptVersions(self._path)
            version, missing = restore_version(self._cluster, self._ledger, kept, expected)
            self._wake_in, self._wake_out = socket.socketpair()
            undo.callback(self._wake_in.close)
            undo.callback(self._wake_out.close)
            self._wake_in.setblocking(False)
            self._wake_out.setblocking(False)
            self._driver = BackendDriver(self._cluster, self._wake)
            undo.callback(self._driver.stop, 30.0)
            sessions = Sessions(self._socket)
            self._weights = WeightReceiver(expected, policies, self._driver, self._ledger, kept, sessions, self._push_idle,
                                           version, missing, getattr(self._cluster, "room_for_weights", None))
            self._generation = GenerationControl(sessions, self._ledger, self._driver, self._retries)
            status = GatewayStatus(self._ledger, self._driver, sessions, self._weights, self._retries, self._generation)
            self._operations = Operations(sessions, self._driver, expected, self._generation)
            self._router = MessageRouter(sessions, self._ledger, self._driver, self._weights, status, self._operations,
                                         self._generation)
            self._absent = AbsentClients(sessions, self._ledger, self._driver, self._grace)
            thread = threading.Thread(target=self._run, name="blockroll-gateway", daemon=True)
            thread.start()
            self._thread = thread
            undo.pop_all()
        return self

    @property
    def address(self) -> str:
        """The address clients connect to, with the port that was bound."""
        return self._socket.address

    @property
    def paused(self) -> str:
        """Mode of the pause, if generation is paused; any thread may read it."""
        return self._generation.mode

    @property
    def version(self) -> int:
        """The weight version that was committed last."""
        return self._weights.version

    @property
    def progress(self) -> ProgressFeed:
        """What unfinished samples have made, for listeners of this process."""
        return self._driver.progress

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until a Shutdown or a failure, which is raised, ends the gateway; whether it has ended."""
        assert self._thread is not None, "wait() before start()"
        self._thread.join(timeout)
        if self._error is not None:
            raise self._error
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Stops serving. The ledger keeps what is unfinished or unacknowledged. Raises what made the gateway fail."""
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
        poller.register(self._socket.socket, zmq.POLLIN)
        poller.register(self._wake_in.fileno(), zmq.POLLIN)
        try:
            waiting = False
            while not self._stopping:
                poller.poll(int(1000 * (FULL_S if waiting else IDLE_S)))
                waiting = self._round()
            self._farewell(self._router.tell_stopping)
        except BaseException as error:
            # Kept for wait() and stop(), which raise it to the gateway's owner.
            self._error = error
            kind = "storage" if isinstance(error, StorageError) else "cluster"
            why = str(error) if kind == "storage" else f"the gateway failed: {type(error).__name__}: {error}"
            _log.error("the gateway ends: %s", why)
            self._farewell(lambda: self._router.tell_failure(kind, why))
        finally:
            self._driver.stop(30.0)
            self._weights.close()
            self._socket.close(LINGER_S)
            self._ledger.close()
            with self._lock:
                self._wake_in.close()
                self._wake_out.close()

    def _farewell(self, tell: Callable[[], int]) -> None:
        """Calls `tell` until it returns 0 or FAREWELL_S have passed; `tell` tells clients that the gateway ends and
        returns how many of them are still connected. A client disconnects once it has been told.

        Messages on their way when a connection ends may be lost, with `linger` and without: a socket that is closed
        over unread bytes resets the connection, and a reset discards what the peer has not read. So everything that
        arrives is read.
        """
        deadline = time.monotonic() + FAREWELL_S
        while tell() and time.monotonic() < deadline:
            self._socket.socket.poll(int(1000 * FULL_S))
            while self._socket.receive() is not None:
                pass

    def _round(self) -> bool:
        """Does everything there is to do, once; whether something waits for a peer with no room or for the disk."""
        self._ledger.check()
        with suppress(BlockingIOError):
            self._wake_in.recv(4096)
        for _ in range(BURST):
            inbound = self._socket.receive()
            if inbound is None:
                break
            self._router.receive(inbound)
        self._router.record_parts()
        now = time.monotonic()
        waiting = self._collect(now)
        if not self._weights.undecided:
            self._router.mark(self._generation.advance(now))
        waiting |= self._generation.busy
        self._expire(now)
        self._absent.check(now)
        self._dispatch(now)
        self._stopping = self._stopping or self._router.shutdown or self._drained
        try:
            waiting |= self._router.work(now)
            self._retries.worked("send")
        except StorageError as error:
            self._retries.failed("send", error, now)
        if (refused := self._router.ack_error) is not None:
            self._retries.failed("acknowledge", refused, now)
        else:
            self._retries.worked("acknowledge")
        return waiting

    def _collect(self, now: float) -> bool:
        """Handles the cluster's events; keeps outputs that the disk refuses and tries again. Whether something waits
        for the disk."""
        while not self._driver.events.empty():
            event = self._driver.events.get()
            if isinstance(event, Outputs):
                self._unrecorded.extend(event.completed)
                self._leases.update({item.epoch: now for item in event.completed if item.epoch in self._leases})
            elif isinstance(event, CommitEnded):
                self._weights.ended(event)
            elif isinstance(event, WorkRefused):
                self._revoked.add(event.epoch)
                self._retries.postpone("dispatch", now)
            elif isinstance(event, Crashed):
                raise event.error
        if self._weights.undecided and self._retries.due("commit", now):
            try:
                self._weights.settle()
            except StorageError as error:
                self._retries.failed("commit", error, now)
            else:
                self._retries.worked("commit")
        if self._unrecorded and not self._weights.undecided and self._retries.due("record", now):
            try:
                self._router.mark(self._ledger.record(self._unrecorded))
            except StorageError as error:
                self._retries.failed("record", error, now)
            else:
                self._unrecorded.clear()
                self._retries.worked("record")
        return bool(self._unrecorded) or self._weights.undecided

    def _dispatch(self, now: float) -> None:
        """Ends revoked leases, also during a pause or an abort, which waits for what is leased. Then leases queued batches while
        there is room."""
        weights = self._weights
        if self._unrecorded or weights.undecided or not self._retries.due("dispatch", now):
            return
        try:
            for epoch in (ended := sorted(self._revoked)):
                self._ledger.release(epoch)
                self._driver.revoke(epoch)
                self._revoked.remove(epoch)
                self._leases.pop(epoch, None)
                _log.info("lease %d is over; its unfinished work is leased again", epoch)
                self._generation.requeued()
            held = weights.missing or self._operations.draining or self._generation.holds_back
            while not held and (leased := self._lease()) is not None:
                if leased[1]:  # the rows of a batch may all be damaged
                    self._leases[leased[0]] = now
                    _log.info("lease %d: %d requests", leased[0], len(leased[1]))
                    self._driver.submit(*leased)
            if ended or not held:
                self._retries.worked("dispatch")
        except StorageError as error:
            self._retries.failed("dispatch", error, now)

    def _lease(self) -> tuple[int, list[RolloutRequest], list[str]] | None:
        """The next lease: a whole batch, or requests of clients in turn. None when there is no work or no room."""
        if getattr(self._cluster, "dispatch", "ordered") == "continuous":
            return self._ledger.lease_in_turn(self._max_in_flight, self._driver.in_flight_of())
        room = self._max_in_flight - self._driver.in_flight
        leased = self._ledger.lease(room, self._driver.in_flight == 0) if room > 0 else None
        return leased and (*leased, [""] * len(leased[1]))

    @property
    def _drained(self) -> bool:
        """Whether a drain was asked for and has ended: no engine holds work, no version is
        being committed, and every output is in the ledger."""
        return (self._operations.draining and not self._driver.in_flight and not self._unrecorded
                and not self._weights.busy and self._driver.events.empty())

    def _expire(self, now: float) -> None:
        """Ends a push nobody feeds, and revokes the leases no sample has come of for `lease_seconds`."""
        self._weights.expire(now)
        for epoch in [epoch for epoch in self._leases if not self._driver.holds(epoch)]:
            del self._leases[epoch]
        if self._driver.stats.get("loading") or self._driver.holding:
            self._leases = dict.fromkeys(self._leases, now)
        late = {e for e, since in self._leases.items() if self._lease_seconds and now - since > self._lease_seconds}
        if late - self._revoked:
            _log.warning("no sample for %g s of the leases %s", self._lease_seconds, sorted(late - self._revoked))
            self._revoked |= late
            # The other leases may have waited behind these.
            self._leases = dict.fromkeys(self._leases, now)

    def _wake(self) -> None:
        # A full pipe holds enough wake-ups.
        with self._lock, suppress(BlockingIOError):
            if self._wake_out.fileno() >= 0:
                self._wake_out.send(b"!")
