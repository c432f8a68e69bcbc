"""A client's exchange with the gateway across sessions: submits, deliveries, acknowledgements, credit.

Invariants:
- A new session first repeats the acknowledgements nobody confirmed, then submits what is unfinished; both are idempotent.
- A session goes on where the last one ended: nothing that arrived is sent to this life of the client again.
- Undelivered bytes in the inbox stay below WINDOW plus one trajectory, except those the caller set aside.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from ..errors import BlockrollError, TransportError
from .connection import Connection, SessionLost, refusal
from .messages import (
    MAX_ACKS,
    Ack,
    Acked,
    Credit,
    Delivery,
    Failure,
    Message,
    Refused,
    Status,
    StatusRequest,
    Submit,
    Submitted,
)
from .tracks import Book

WINDOW = 64 << 20
"""Bytes of deliveries the gateway may send ahead of the caller."""
_SUBMITS, _ACKS, _WAIT_S = 4, 8, 0.2
Figures = dict[str, float | int | str]
Keys = tuple[tuple[str, int], ...]


class Deliveries:
    """Drives a connection until what the caller waits for is in the book. One thread at a time."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self.book = connection, Book()
        self._acks: deque[tuple[str, int]] = deque()
        self._acks_out: dict[int, Keys] = {}
        self._cursor = self._received = self._granted = self._number = self._session = 0
        self._status: tuple[int, Figures] = (0, {})
        self._moved = 0.0
        self._refusal: BlockrollError | None = None

    @property
    def acknowledging(self) -> bool:
        """Whether an acknowledgement is not confirmed yet."""
        return bool(self._acks or self._acks_out)

    def drive(self, done: Callable[[], bool], timeout: float | None = None, *, reopen: bool = True) -> None:
        """Exchanges messages until `done()`; opens a new session whenever one is lost, unless `reopen` is False.

        Raises TransportError when the gateway is silent too long or nothing arrives for `timeout` seconds, and what the
        gateway refused.
        """
        self._moved, wait = time.monotonic(), 0.0
        while True:
            try:
                if not self.connection.is_open:
                    if not reopen:
                        return
                    self._open()
                self._exchange(wait)
                if self._refusal is None and done():
                    return
                wait = _WAIT_S if timeout is None else min(_WAIT_S, timeout)
            except SessionLost:
                self.connection.drop()
            if self._refusal is not None:
                error, self._refusal = self._refusal, None
                raise error
            if timeout is not None and time.monotonic() - self._moved > timeout:
                missing = self.book.requested - self.book.unique - self.book.failed
                notice = self.connection.notice or "the gateway answers and reports no trouble"
                raise TransportError(f"no trajectory for {timeout:g} s, {missing} samples are outstanding ({notice}); "
                                     "wait longer, or see status()")

    def acknowledge(self, keys: Sequence[tuple[str, int]]) -> None:
        """Acknowledges with the next exchange."""
        self._acks.extend(keys)

    def status(self) -> Figures:
        """Asks the gateway for its figures."""
        self._number += 1
        number, asked = self._number, -1

        def answered() -> bool:
            nonlocal asked
            if asked != self._session:
                self.connection.send(StatusRequest(number))
                asked = self._session
            return self._status[0] == number

        self.drive(answered)
        return self._status[1]

    def _open(self) -> None:
        for keys in reversed(self._acks_out.values()):
            self._acks.extendleft(reversed(keys))
            self.book.tell(keys, -1)
        self._acks_out.clear()
        self.book.restart()
        self._received, self._granted = 0, max(WINDOW - self.book.held, 0)
        self._session += 1
        ledger = self.connection.ledger
        self.connection.open(self._granted, self._cursor)
        if self.connection.ledger != ledger:
            self._cursor = 0

    def _exchange(self, wait: float) -> None:
        self._flush()
        try:
            for message in self.connection.receive(wait):
                self._handle(message)
        except BaseException:
            # What this session received and nobody handled ends with it; the next one is sent it again.
            self.connection.drop()
            raise
        self._flush()

    def _flush(self) -> None:
        """Sends what may be sent, acknowledgements first: a request's parts say how many were sent before them."""
        while self._acks and len(self._acks_out) < _ACKS:
            keys = tuple(self._acks.popleft() for _ in range(min(len(self._acks), MAX_ACKS)))
            self._number += 1
            self._acks_out[self._number] = keys
            self.book.tell(keys)
            self.connection.send(Ack(self._number, keys))
        for name, batch in self.book.batches.items():
            while len(batch.told) < len(batch.parts) and len(batch.told) - batch.recorded < _SUBMITS:
                index, records = len(batch.told), self.book.part(batch)
                self.connection.send(Submit(name, index, index == len(batch.parts) - 1, records))
            if len(batch.told) < len(batch.parts):
                break
        granted = self._received + max(WINDOW - self.book.held, 0)
        if granted - self._granted >= WINDOW // 8:
            self._granted = granted
            self.connection.send(Credit(granted))

    def _handle(self, message: Message) -> None:
        if isinstance(message, Delivery):
            self._cursor, self._moved = message.number, time.monotonic()
            self._received += len(message.blobs[0])
            self.book.deliver(message.request_id, message.sample, bytes(message.blobs[0]))
        elif isinstance(message, Failure):
            self._cursor, self._moved = message.number, time.monotonic()
            self._received += len(message.error.encode())
            self.book.fail(message.request_id, message.error)
        elif isinstance(message, Submitted):
            self.book.submitted(message)
        elif isinstance(message, Acked):
            self.book.confirm(self._acks_out.pop(message.number, ()))
        elif isinstance(message, Status):
            self._status = (message.number, dict(message.figures))
        elif isinstance(message, Refused) and message.about in self.book.batches:
            self.book.abandon(message.about)
            self._refusal = refusal(message)
