"""Says what each message of a client does, and sends clients what the ledger holds for them.

Invariants:
- A message counts only inside a session, under the key and of the kind (data or control) the session was opened with.
  Any other message is answered with Reset or Refused.
- What is recorded in a round of the gateway reaches the disk with one `sync`. Confirmations and deliveries wait for it.
- A batch of which a part is refused is refused whole: the parts that come behind it are not recorded.
- Deliveries leave in the order of the ledger, as far as the client's credit in bytes reaches.
- What a full disk refuses is tried again, or told to the client, whose next session repeats it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from ...errors import StorageError, TransportError
from ..wire import messages
from ..wire.codec import clip
from ..wire.gateway_socket import Inbound
from ..wire.limits import MAX_FIGURE_TEXT, MAX_NAME, MAX_STATS
from ..wire.records import FAILURE, decode_request
from .backend_driver import BackendDriver
from .batch_parts import Part
from .gateway_status import GatewayStatus
from .generation_control import GenerationControl
from .ledger import Ledger
from .operations import Operations
from .sessions import MAX_SESSIONS, Session, Sessions
from .weight_receiver import WeightReceiver

_log = logging.getLogger(__package__)
MAX_ACKS_WAITING = 64
"""Ack messages of one session that may wait for the disk."""
MAX_PART_BYTES = 16 << 20
"""Bytes of request records that may wait for one transaction."""
MAX_REFUSED = 64
"""Refused batches of one session that are remembered. Their other parts are on their way already."""
PROBE_S, RETRY_S = 5.0, 0.5
"""Seconds between two Pongs to idle clients, and before the disk is tried again."""


class MessageRouter:
    """Used from the gateway's thread alone.

    Args:
        driver: ends the samples of requests that are cancelled.
        weights: takes the messages of weight pushes.
        status: answers Ping and StatusRequest, and counts malformed messages.
        operations: answers operators.
        generation: pauses generation and aborts requests.

    Attributes:
        shutdown: a control session asked the gateway to stop.
    """

    def __init__(self, sessions: Sessions, ledger: Ledger, driver: BackendDriver, weights: WeightReceiver,
                 status: GatewayStatus, operations: Operations, generation: GenerationControl) -> None:
        self._operations, self._generation = operations, generation
        self._sessions, self._ledger, self._driver = sessions, ledger, driver
        self._weights, self._status = weights, status
        self._probed = self._retry = 0.0
        self._parts: list[tuple[Session, Part]] = []
        self._part_bytes = 0
        self._refused: set[tuple[str, str]] = set()  # (client, batch) of which the ledger may hold parts
        self._unsaid: list[tuple[bytes, messages.Message]] = []
        self.shutdown = False

    @property
    def ack_error(self) -> StorageError | None:
        """Why the disk refuses an acknowledgement of an open session; None when none waits."""
        return next((s.ack_error for s in self._sessions if s.ack_error is not None), None)

    def receive(self, inbound: Inbound) -> None:
        """Acts on one message."""
        try:
            message = messages.decode(inbound.frames)
        except TransportError as error:
            self._status.malformed += 1
            self._refuse(inbound.peer, str(error))
            return
        if not isinstance(message, messages.Submit):
            # A message counts after all that came before it.
            self.record_parts()
        if not isinstance(message, messages.Submit | messages.Ack | messages.Credit):
            self._confirm()
        if isinstance(message, messages.Hello):
            self._hello(inbound, message)
            return
        session = self._sessions.find(inbound.peer, inbound.key)
        if session is None:
            self._sessions.tell_peer(inbound.peer, messages.Reset())
        elif (act := (_CONTROL if session.control else _DATA).get(type(message))) is not None:
            act(self, session, message)
        else:
            kind = "control" if session.control else "data"
            self._refuse(session.peer, f"{type(message).__name__} is not a message of the {kind} plane of a client")

    def mark(self, clients: Iterable[str]) -> None:
        """The ledger has something new for these clients."""
        names = set(clients)
        for session in self._sessions:
            session.more = session.more or session.client in names

    def work(self, now: float) -> bool:
        """Sends what there is to send; whether something waits for a peer with no room or for the disk."""
        if now - self._probed > PROBE_S:
            self._probed = now
            for session in self._sessions:
                if not session.outbox:
                    self._ping(session, messages.Ping())
        if self._refused and now >= self._retry:
            self._forget_refused()
        waiting = False
        self.mark(self._ledger.take_news())
        for session in self._sessions:
            if session.acks and now >= self._retry:
                self._record_acks(session)
        self._confirm()
        for session in self._sessions:
            waiting |= not self._sessions.flush(session)
            if not session.control and session.more and not session.outbox and session in self._sessions:
                waiting |= not self._deliver(session)
        return waiting

    def tell_failure(self, kind: str, text: str) -> int:
        """Tells every client that the gateway ends because of an error; returns how many are still connected."""
        return self._sessions.tell(self._sessions, messages.Refused("", kind, clip(text)))

    def tell_stopping(self) -> int:
        """Tells the clients that asked for it that the gateway stops; returns how many of them are still connected."""
        return self._sessions.tell([s for s in self._sessions if s.asked_to_stop], messages.Stopping())

    def _hello(self, inbound: Inbound, hello: messages.Hello) -> None:
        keys = self._sessions.socket.keys
        if keys is not None and inbound.key not in (keys.control if hello.control else keys.data):
            plane = "control" if hello.control else "data"
            self._refuse(inbound.peer, f"this key is not allowed on the {plane} plane; "
                                       "list it there, or use the other key")
            return
        if self._sessions.full:
            self._refuse(inbound.peer, f"{MAX_SESSIONS} sessions are open; close some clients")
            return
        if not hello.control:
            try:
                self._ledger.claim(hello.client, inbound.key)
                self._ledger.resume(hello.client)  # forgets its batches that are not complete, also those in `_refused`
                self._refused = {(client, batch) for client, batch in self._refused if client != hello.client}
            except TransportError as error:
                self._refuse(inbound.peer, str(error))
                return
            except StorageError as error:
                self._sessions.tell_peer(inbound.peer, messages.Refused("", "storage", clip(str(error))))
                return
            for other in self._sessions:
                if other.client == hello.client and not other.control:
                    if other.peer != inbound.peer:
                        self._refuse(other.peer, f"another connection took over client id {hello.client!r}; "
                                                 "give each client its own")
                    self._sessions.drop(other)
        cursor = hello.cursor if hello.ledger == self._ledger.ledger_id else 0
        session = Session(inbound.peer, hello.client, inbound.key, hello.control, hello.credit, cursor=cursor)
        self._sessions.open(session)
        _log.info("session of client %s is open", hello.client)
        self._sessions.reply(inbound.peer, messages.Welcome(self._ledger.ledger_id, self._status.version))
        if self._status.notice():
            self._ping(session, messages.Ping())

    def _ping(self, session: Session, message: messages.Ping) -> None:
        self._sessions.reply(session.peer, messages.Pong(self._status.version, self._status.notice()))

    def _figures(self, session: Session, message: messages.StatusRequest) -> None:
        self._ledger.sync()  # what they count is on disk
        figures = tuple((clip(name, MAX_NAME), clip(value, MAX_FIGURE_TEXT) if isinstance(value, str) else value)
                        for name, value in self._status.figures().items())
        self._sessions.reply(session.peer, messages.Status(message.number, figures[:MAX_STATS]))

    def _push(self, session: Session, message: (
        messages.PushBegin | messages.PushChunk | messages.PushCommit | messages.PushAbort | messages.PushLabel
    )) -> None:
        self._weights.handle(session.peer, session.client, message)

    def _interrupt(self, session: Session, message: (
        messages.Pause | messages.Resume | messages.Abort | messages.ResetPrefixCache
    )) -> None:
        self._generation.handle(session, message)

    def _operate(self, session: Session, message: (
        messages.EnginesRequest | messages.TensorsRequest | messages.Scale | messages.Drain
    )) -> None:
        if isinstance(message, messages.EnginesRequest):
            self._operations.engines(session, message)
        elif isinstance(message, messages.TensorsRequest):
            self._operations.tensors(session, message)
        elif isinstance(message, messages.Scale):
            self._operations.scale(session, message)
        else:
            self._operations.drain(session, message)
            self._weights.draining = True

    def _shutdown(self, session: Session, message: messages.Shutdown) -> None:
        _log.info("client %s asks the gateway to stop", session.client)
        self.shutdown = session.asked_to_stop = True

    def _credit(self, session: Session, message: messages.Credit) -> None:
        session.granted = max(session.granted, message.granted)

    def _submit(self, session: Session, message: messages.Submit) -> None:
        try:
            requests = [(decode_request(blob), bytes(blob)) for blob in message.requests]
        except TransportError as error:
            self._status.malformed += 1
            self.record_parts()  # the receipts of the parts before come before the refusal
            self._refuse_batch(session, messages.Refused(message.batch, "transport", clip(str(error))))
            return
        if (refused := session.refused.get(message.batch)) is not None:
            self._unsaid.append((session.peer, refused))
            return
        self._parts.append((session, Part(session.client, message.batch, message.index, requests, message.final)))
        self._part_bytes += sum(len(record) for _, record in requests)
        if self._part_bytes > MAX_PART_BYTES:
            self.record_parts()

    def record_parts(self) -> None:
        """Records the parts of batches that have come, in one transaction, and confirms them."""
        if not self._parts:
            return
        parts, self._parts, self._part_bytes = self._parts, [], 0
        self._forget_refused()
        try:
            receipts = self._ledger.record_parts([part for _, part in parts])
        except StorageError as error:
            for session, part in parts:
                _log.warning("a batch of client %s is refused: %s", session.client, error)
                self._refuse_batch(session, messages.Refused(part.batch, "storage", clip(str(error))))
            return
        for (session, part), (acked, refused) in zip(parts, receipts, strict=True):
            for place, why in refused:
                _log.info("request %s of client %s is refused: %s", part.requests[place][0].id, session.client, why)
            self._unsaid.append((session.peer, messages.Submitted(part.batch, part.index, tuple(acked),
                                                                  tuple((i, clip(why)) for i, why in refused))))
        self.mark({session.client for session, _ in parts})

    def _refuse_batch(self, session: Session, refused: messages.Refused) -> None:
        session.refused[refused.about] = refused
        if len(session.refused) > MAX_REFUSED:
            del session.refused[next(iter(session.refused))]
        self._refused.add((session.client, refused.about))
        self._unsaid.append((session.peer, refused))

    def _confirm(self) -> None:
        """Tells clients what was recorded for them, in the order in which it was recorded."""
        if self._unsaid:
            self._ledger.sync()
            unsaid, self._unsaid = self._unsaid, []
            for peer, message in unsaid:
                self._sessions.reply(peer, message)

    def _forget_refused(self) -> None:
        """Has the ledger forget what it holds of refused batches. Where the disk refuses that, they wait."""
        try:
            if self._refused:
                self._ledger.forget_batches(self._refused)
                self._refused.clear()
        except StorageError as error:
            self._retry = time.monotonic() + RETRY_S
            _log.debug("%d refused batches are still in the ledger: %s", len(self._refused), error)

    def _cancel(self, session: Session, message: messages.Cancel) -> None:
        try:
            leased = self._ledger.cancel(session.client, message.ids, message.why)
        except StorageError as error:
            # The client's next session repeats what was not confirmed.
            _log.warning("a cancellation of client %s waits for the disk: %s", session.client, error)
            self._sessions.drop(session)
            return
        _log.info("client %s cancels %d requests, %d of them leased", session.client, len(message.ids), len(leased))
        if leased:
            self._driver.cancel(leased)
        self.mark([session.client])
        self._sessions.reply(session.peer, messages.Cancelled(message.number))

    def _ack(self, session: Session, message: messages.Ack) -> None:
        session.acks.append(message)
        if len(session.acks) > MAX_ACKS_WAITING:
            self._sessions.drop(session)
        else:
            self._record_acks(session)

    def _record_acks(self, session: Session) -> None:
        while session.acks:
            try:
                self._ledger.acknowledge(session.client, session.acks[0].keys)
            except StorageError as error:
                session.ack_error, self._retry = error, time.monotonic() + RETRY_S
                return
            session.ack_error = None
            self._unsaid.append((session.peer, messages.Acked(session.acks.popleft().number)))

    def _deliver(self, session: Session) -> bool:
        """Sends what the ledger holds, within the credit; False when the peer has no room."""
        while session.more and session.sent < session.granted:
            rows = self._ledger.pending(session.client, session.cursor)
            session.more = bool(rows)
            self._ledger.sync()
            for row in rows:
                if session.sent >= session.granted:
                    return True
                if row.sample == FAILURE:
                    message: messages.Message = messages.Failure(row.seq, row.request_id, row.payload.decode("utf-8", "replace"))
                else:
                    message = messages.Delivery(row.seq, row.request_id, row.sample, (row.payload,))
                result = self._sessions.tell_peer(session.peer, message)
                if result == "full":
                    return False
                if result == "gone":
                    self._sessions.drop(session)
                    return True
                session.cursor = row.seq
                session.sent += len(row.payload)
        return True

    def _refuse(self, peer: bytes, text: str) -> None:
        _log.info("a peer is refused: %s", text)
        self._sessions.tell_peer(peer, messages.Refused("", "transport", clip(text)))


_Acts = dict[type[messages.Message], Callable[[MessageRouter, Session, Any], None]]
_ANY: _Acts = {messages.Ping: MessageRouter._ping, messages.StatusRequest: MessageRouter._figures}
_DATA: _Acts = _ANY | {
    messages.Submit: MessageRouter._submit, messages.Cancel: MessageRouter._cancel,
    messages.Credit: MessageRouter._credit, messages.Ack: MessageRouter._ack}
_PUSH = (messages.PushBegin, messages.PushChunk, messages.PushCommit, messages.PushAbort, messages.PushLabel)
_INTERRUPT = (messages.Pause, messages.Resume, messages.Abort, messages.ResetPrefixCache)
_OPERATE = (messages.EnginesRequest, messages.TensorsRequest, messages.Scale, messages.Drain)
_CONTROL: _Acts = _ANY | {
    messages.Shutdown: MessageRouter._shutdown,
    **dict.fromkeys(_PUSH, MessageRouter._push),
    **dict.fromkeys(_INTERRUPT, MessageRouter._interrupt),
    **dict.fromkeys(_OPERATE, MessageRouter._operate)}
