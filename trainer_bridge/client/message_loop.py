"""Exchanges messages with a gateway across sessions: submissions, deliveries, acknowledgements, credit, figures.

Invariants:
- A new session first repeats the acknowledgements that were not confirmed, then submits what is unfinished and repeats
  the cancellations that were not confirmed. All of them may be repeated without effect.
- The gateway is told what has arrived (`cursor`), so a new session brings nothing twice to this life of the client.
- Undelivered bytes in the inbox stay below WINDOW plus one trajectory. What the caller has taken from the inbox does
not count.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from ...errors import BlockrollError, TransportError
from ..wire import messages
from ..wire.limits import MAX_ACKS, MAX_CANCELS
from .connection import Connection, SessionLost, refusal
from .pending_requests import PendingRequests

_log = logging.getLogger(__package__)
WINDOW = 64 << 20
"""Bytes of deliveries the gateway may send ahead of the caller."""
MAX_UNCONFIRMED_ACKS = 8
"""Full Ack messages that may be sent before the gateway has confirmed them. One that is not full waits until those before it are
confirmed, since each is one write to the gateway's disk: acknowledgements that come meanwhile go with it."""
MAX_LAST_ACKS = 32
"""Ack messages, full or not, that may be unconfirmed when the caller may be away for long (`send_acks`) or wants figures. A
gateway whose disk is full keeps 64 of a session."""
ACK_S = 0.05
"""Seconds between two Ack messages that are not full. One goes at once with a batch, or where a call waits for it."""
_WAIT_S = 0.2
Figures = dict[str, float | int | str]
Keys = tuple[tuple[str, int], ...]


class NoTrajectory(TransportError):
    """None arrived in the time that the caller gave. The gateway answers."""


class MessageLoop:
    """Sends what is to be sent and enters what arrives into `pending`.

    Attributes:
        lock: guards the loop and `pending`; every method is called with it held. Of the calls that wait, one leads: it
            exchanges messages for all of them, and gives up the lock while it waits for the socket.
        closed: the client is closed; calls that wait end.
    """

    def __init__(self, connection: Connection, pending: PendingRequests) -> None:
        self.connection, self.pending = connection, pending
        self.lock = threading.Condition(threading.Lock())
        self._acks: deque[tuple[str, int]] = deque()
        self._acks_urgent, self._acked_at, self._given = False, 0.0, 0
        self._unconfirmed_acks: dict[int, Keys] = {}
        self._cancels: dict[int, tuple[str, tuple[str, ...]]] = {}
        self._cancels_sent: set[int] = set()
        self._cursor = self._received = self._granted = self._number = self._session = 0
        self._wanted: dict[int, int] = {}
        self._figures: dict[int, Figures] = {}
        self._last_delivery = 0.0
        self._refusals: dict[str, BlockrollError] = {}
        self._awaited: list[str] = []
        self._leading = self._leaving = False
        self.closed = False

    @property
    def acknowledging(self) -> bool:
        """Whether an acknowledgement is not confirmed yet."""
        return bool(self._acks or self._unconfirmed_acks)

    def run_until(self, done: Callable[[], bool], timeout: float | None = None, *, batch: str = "",
                  reopen: bool = True) -> None:
        """Exchanges messages until `done()`, which has no effects; opens a new session whenever one is lost, if
        `reopen`. The caller holds `lock`, which is free while this call waits.

        Raises TransportError when the gateway is silent too long or nothing is delivered for `timeout` seconds, and
        what the gateway refused: of the batch `batch`, or of a batch no other call waits for.
        """
        start, wait = time.monotonic(), 0.0
        self._awaited.append(batch)
        try:
            self.connection.wake()
            while True:
                if self.closed:
                    raise TransportError("this client is closed; connect again with the same client_id")
                if self._leading:
                    self.lock.wait(wait)
                elif not self._lead(wait, reopen):
                    return
                self._raise_refusal(batch)
                if self.connection.is_open and done():
                    return
                wait = _WAIT_S if timeout is None else min(_WAIT_S, timeout)
                if timeout is not None and time.monotonic() - max(start, self._last_delivery) > timeout:
                    notice = self.connection.notice or "the gateway answers and reports no trouble"
                    raise NoTrajectory(f"no trajectory for {timeout:g} s, {self.pending.missing} samples are outstanding "
                                       f"({notice}); wait longer, or see status()")
        finally:
            self._awaited.remove(batch)

    def stop(self) -> None:
        """Ends every other call; from now on each raises TransportError. The caller holds `lock`."""
        self.closed = True
        while self._leading:
            self.connection.wake()
            self.lock.wait(_WAIT_S)
        self.closed = False

    def _lead(self, wait: float, reopen: bool) -> bool:
        """One exchange, by the one thread that uses the connection meanwhile; False where no session may be opened."""
        self._leading = True
        try:
            if not self.connection.is_open:
                if not reopen:
                    return False
                self._open()
            self._exchange(wait)
        except SessionLost:
            _log.info("the session with %s is lost", self.connection.address)
            self.connection.drop()
        finally:
            self._leading = False
            self.lock.notify_all()
        return True

    def _raise_refusal(self, batch: str) -> None:
        for name in self._refusals:
            if name == batch or name not in self._awaited:
                raise self._refusals.pop(name)

    def acknowledge(self, keys: Sequence[tuple[str, int]]) -> None:
        """Acknowledges these (request id, sample) with one of the next exchanges."""
        self._acks.extend(keys)
        self._given += len(keys)

    def confirmation(self) -> Callable[[], bool]:
        """Sends the acknowledgements that were given before this call with the next exchange. Returns a function that says
        whether the gateway has confirmed them. Later ones do not count: a thread that takes results gives one after the other."""
        self._acks_urgent, given = True, self._given
        return lambda: self._given - len(self._acks) - sum(map(len, self._unconfirmed_acks.values())) >= given

    def send_acks(self) -> None:
        """Sends the acknowledgements that wait for others to be confirmed, unless the client is closed."""
        if self._acks and not self.closed:
            self._leaving = True
            self.run_until(lambda: True)

    def cancel(self, request_ids: Sequence[str], why: str) -> list[int]:
        """Cancels these requests with the next exchange; returns the numbers of the messages (`confirmed`)."""
        numbers = []
        for start in range(0, len(request_ids), MAX_CANCELS):
            self._number += 1
            numbers.append(self._number)
            self._cancels[self._number] = (why, tuple(request_ids[start:start + MAX_CANCELS]))
        return numbers

    def confirmed(self, numbers: Sequence[int]) -> bool:
        """Whether the gateway has confirmed these cancellations."""
        return self._cancels.keys().isdisjoint(numbers)

    def status(self) -> Figures:
        """Asks the gateway for its figures."""
        self._number += 1
        number = self._number
        self._wanted[number] = 0
        self._leaving = True  # the figures count what was acknowledged before, so that goes before the question
        try:
            self.run_until(lambda: number in self._figures)
            return self._figures.pop(number)
        finally:
            del self._wanted[number]

    def _open(self) -> None:
        for keys in reversed(self._unconfirmed_acks.values()):
            self._acks.extendleft(reversed(keys))
            self.pending.count_acks(keys, -1)
        self._unconfirmed_acks.clear()
        self._acks_urgent = True
        self._cancels_sent.clear()
        self.pending.restart()
        self._received, self._granted = 0, max(WINDOW - self.pending.inbox_bytes, 0)
        self._session += 1
        ledger = self.connection.ledger
        self.connection.open(self._granted, self._cursor)
        if self.connection.ledger != ledger:
            self._cursor = 0

    def _exchange(self, wait: float) -> None:
        self._flush()
        try:
            if wait:
                self.lock.release()
                try:
                    self.connection.wait(wait)
                finally:
                    self.lock.acquire()
            for message in self.connection.receive(0.0):
                self._handle(message)
        except BaseException:
            # Messages that arrived and were not handled end with this session. The next session brings them again.
            self.connection.drop()
            raise
        self._flush()

    def _flush(self) -> None:
        """Sends what may be sent. Acknowledgements go first: a part's receipt is read against the acknowledgements
        before it."""
        now = time.monotonic()
        few = int(self._acks_urgent or self.pending.submitting or now - self._acked_at >= ACK_S)
        while self._acks and len(self._unconfirmed_acks) < (
                MAX_LAST_ACKS if self._leaving else MAX_UNCONFIRMED_ACKS if len(self._acks) >= MAX_ACKS else few):
            self._acked_at = now
            keys = tuple(self._acks.popleft() for _ in range(min(len(self._acks), MAX_ACKS)))
            self._number += 1
            self._unconfirmed_acks[self._number] = keys
            self.pending.count_acks(keys, 1)
            self.connection.send(messages.Ack(self._number, keys))
        self._leaving = self._leaving and bool(self._acks)
        self._acks_urgent = self._acks_urgent and bool(self._acks)
        for part in self.pending.parts():
            self.connection.send(part)
        for number in [n for n in self._cancels if n not in self._cancels_sent]:
            self._cancels_sent.add(number)
            self.connection.send(messages.Cancel(number, *self._cancels[number]))
        granted = self._received + max(WINDOW - self.pending.inbox_bytes, 0)
        if granted - self._granted >= WINDOW // 8:
            self._granted = granted
            self.connection.send(messages.Credit(granted))
        for number in [n for n, session in self._wanted.items() if session != self._session]:
            self._wanted[number] = self._session
            self.connection.send(messages.StatusRequest(number))

    def _handle(self, message: messages.Message) -> None:
        if isinstance(message, messages.Delivery):
            self._cursor, self._last_delivery = message.number, time.monotonic()
            self._received += len(message.blobs[0])
            self.pending.deliver(message.request_id, message.sample, bytes(message.blobs[0]))
        elif isinstance(message, messages.Failure):
            self._cursor, self._last_delivery = message.number, time.monotonic()
            self._received += len(message.error.encode())
            _log.info("request %s is refused: %s", message.request_id, message.error)
            self.pending.fail(message.request_id, message.error)
        elif isinstance(message, messages.Submitted):
            self.pending.receipt(message)
        elif isinstance(message, messages.Acked):
            self.pending.confirm(self._unconfirmed_acks.pop(message.number, ()))
        elif isinstance(message, messages.Cancelled):
            self._cancels.pop(message.number, None)
            self._cancels_sent.discard(message.number)
        elif isinstance(message, messages.Status):
            if message.number in self._wanted:
                self._figures[message.number] = dict(message.figures)
        elif isinstance(message, messages.Refused) and message.about in self.pending.batches:
            self.pending.abandon(message.about)
            self._refusals[message.about] = refusal(message)
