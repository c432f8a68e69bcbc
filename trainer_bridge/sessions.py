"""The gateway's open sessions: what clients say into the ledger, what the ledger holds for them out to them.

Invariants:
- A message counts only inside a session, and a session only under the key and on the plane it was opened with; anything
  else is answered with Reset or Refused, never acted on.
- Replies and deliveries are queued or known not to be: a full peer is tried again, a peer that is gone loses its session.
- Deliveries leave in the order of the ledger, as far as the client's credit in bytes reaches.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ..errors import StorageError, TransportError
from .ledger import Ledger
from .messages import (
    MAX_STATS,
    Ack,
    Acked,
    Credit,
    Delivery,
    Failure,
    Hello,
    Message,
    Ping,
    Pong,
    PushAbort,
    PushBegin,
    PushChunk,
    PushCommit,
    Refused,
    Reset,
    Shutdown,
    Status,
    StatusRequest,
    Stopping,
    Submit,
    Submitted,
    Welcome,
    decode,
    encode,
)
from .pushes import PushDesk
from .records import FAILURE, decode_request
from .transport import Inbound, Router

MAX_SESSIONS, MAX_OUTBOX, MAX_ACKS_WAITING = 1024, 256, 64
PROBE_S, RETRY_S = 5.0, 0.5
Figures = dict[str, float | int | str]


@dataclass
class Session:
    """How far a client's queue was sent, in rows and bytes, what waits for room or for the disk, why the disk refused its
    oldest acknowledgement (`trouble`), and whether this client asked the gateway to stop (`stops`)."""

    peer: bytes
    client: str
    key: str
    control: bool
    granted: int
    sent: int = 0
    cursor: int = 0
    more: bool = True
    stops: bool = False
    trouble: StorageError | None = None
    outbox: deque[Message] = field(default_factory=deque)
    acks: deque[Ack] = field(default_factory=deque)


class Sessions:
    """Every open session of a gateway. Used from the gateway's thread alone.

    Attributes:
        desk: takes pushes; set by the gateway before the first message.
        malformed: messages that could not be read, so far.
        shutdown: a control session asked the gateway to stop.
    """

    desk: PushDesk

    def __init__(self, router: Router, ledger: Ledger, version: Callable[[], int], notice: Callable[[], str],
                 figures: Callable[[], Figures]) -> None:
        self._router, self._ledger = router, ledger
        self._version, self._notice, self._figures = version, notice, figures
        self._open: dict[bytes, Session] = {}
        self._probed = self._retry = 0.0
        self.malformed, self.shutdown = 0, False

    @property
    def trouble(self) -> StorageError | None:
        """Why the disk refused an acknowledgement that still waits; what waited goes with its session, to be repeated in the
        client's next one."""
        return next((s.trouble for s in self._open.values() if s.trouble is not None), None)

    def __len__(self) -> int:
        return len(self._open)

    def receive(self, inbound: Inbound) -> None:
        """Acts on one message."""
        try:
            message = decode(inbound.frames)
        except TransportError as error:
            self.malformed += 1
            self._refuse(inbound.peer, str(error))
            return
        if isinstance(message, Hello):
            self._hello(inbound, message)
            return
        session = self._open.get(inbound.peer)
        if session is None or session.key != inbound.key:
            self._router.send(inbound.peer, encode(Reset()))
        elif isinstance(message, Ping):
            self.reply(session.peer, Pong(self._version(), self._notice()))
        elif isinstance(message, StatusRequest):
            figures = tuple((k[:128], v[:256] if isinstance(v, str) else v) for k, v in self._figures().items())
            self.reply(session.peer, Status(message.number, figures[:MAX_STATS]))
        elif session.control and isinstance(message, PushBegin | PushChunk | PushCommit | PushAbort):
            self.desk.handle(session.peer, session.client, message)
        elif session.control and isinstance(message, Shutdown):
            self.shutdown = session.stops = True
        elif not session.control and isinstance(message, Submit):
            self._submit(session, message)
        elif not session.control and isinstance(message, Credit):
            session.granted = max(session.granted, message.granted)
        elif not session.control and isinstance(message, Ack):
            session.acks.append(message)
            if len(session.acks) > MAX_ACKS_WAITING:
                self._drop(session)
            else:
                self._acknowledge(session)
        else:
            plane = "control" if session.control else "data"
            self._refuse(session.peer, f"{type(message).__name__} is not a message of the {plane} plane of a client")

    def reply(self, peer: bytes, message: Message) -> None:
        """Sends within a session, in order; keeps what does not fit yet, forgets a peer that never reads."""
        session = self._open.get(peer)
        if session is None:
            return
        session.outbox.append(message)
        if len(session.outbox) > MAX_OUTBOX:
            self._drop(session)
        else:
            self._flush(session)

    def mark(self, clients: Iterable[str]) -> None:
        """These clients have something new in the ledger."""
        names = set(clients)
        for session in self._open.values():
            session.more = session.more or session.client in names

    def work(self, now: float) -> bool:
        """Sends what there is to send; whether something waits for a full peer or the disk."""
        if now - self._probed > PROBE_S:
            self._probed = now
            for session in list(self._open.values()):
                if not session.outbox:
                    self.reply(session.peer, Pong(self._version(), self._notice()))
        waiting = False
        for session in list(self._open.values()):
            if session.acks and now >= self._retry:
                self._acknowledge(session)
            waiting |= not self._flush(session)
            if not session.control and session.more and not session.outbox and session.peer in self._open:
                waiting |= not self._deliver(session)
        return waiting

    def fail(self, kind: str, text: str) -> int:
        """Tells every client that the gateway ends because of an error; how many are still there."""
        return self._tell(list(self._open.values()), Refused("", kind, text[:1000]))

    def stopping(self) -> int:
        """Tells who asked for it that the gateway stops; how many of them are still there."""
        return self._tell([s for s in self._open.values() if s.stops], Stopping())

    def _tell(self, sessions: list[Session], message: Message) -> int:
        gone = [s for s in sessions if self._router.send(s.peer, encode(message)) == "gone"]
        for session in gone:
            self._drop(session)
        return len(sessions) - len(gone)

    def _hello(self, inbound: Inbound, hello: Hello) -> None:
        keys = self._router.keys
        if keys is not None and inbound.key not in (keys.control if hello.control else keys.data):
            plane = "control" if hello.control else "data"
            self._refuse(inbound.peer, f"this key is not allowed on the {plane} plane; "
                                       "list it there, or use the other key")
            return
        if len(self._open) >= MAX_SESSIONS:
            self._refuse(inbound.peer, f"{MAX_SESSIONS} sessions are open; close some clients")
            return
        if not hello.control:
            try:
                self._ledger.claim(hello.client, inbound.key)
            except TransportError as error:
                self._refuse(inbound.peer, str(error))
                return
            except StorageError as error:
                self._router.send(inbound.peer, encode(Refused("", "storage", str(error)[:1000])))
                return
            for other in [s for s in self._open.values() if s.client == hello.client and not s.control]:
                if other.peer != inbound.peer:
                    self._refuse(other.peer, f"another connection took over client id {hello.client!r}; "
                                             "give each client its own")
                self._drop(other)
        cursor = hello.cursor if hello.ledger == self._ledger.ledger_id else 0
        session = Session(inbound.peer, hello.client, inbound.key, hello.control, hello.credit, cursor=cursor)
        self._open[inbound.peer] = session
        self.reply(inbound.peer, Welcome(self._ledger.ledger_id, self._version()))
        if notice := self._notice():
            self.reply(inbound.peer, Pong(self._version(), notice))

    def _submit(self, session: Session, message: Submit) -> None:
        try:
            requests = [(decode_request(blob), bytes(blob)) for blob in message.requests]
            acked, refused = self._ledger.record_requests(
                session.client, message.batch, message.index, requests, message.final)
        except TransportError as error:
            self.malformed += 1
            self.reply(session.peer, Refused(message.batch, "transport", str(error)[:1000]))
        except StorageError as error:
            self.reply(session.peer, Refused(message.batch, "storage", str(error)[:1000]))
        else:
            self.mark([session.client])
            self.reply(session.peer, Submitted(message.batch, message.index, tuple(acked),
                                               tuple((i, why[:1000]) for i, why in refused)))

    def _acknowledge(self, session: Session) -> None:
        while session.acks:
            try:
                self._ledger.acknowledge(session.client, session.acks[0].keys)
            except StorageError as error:
                session.trouble, self._retry = error, time.monotonic() + RETRY_S
                return
            session.trouble = None
            self.reply(session.peer, Acked(session.acks.popleft().number))

    def _deliver(self, session: Session) -> bool:
        while session.more and session.sent < session.granted:
            rows = self._ledger.pending(session.client, session.cursor)
            session.more = bool(rows)
            for row in rows:
                if session.sent >= session.granted:
                    return True
                if row.sample == FAILURE:
                    message: Message = Failure(row.seq, row.request_id, row.payload.decode("utf-8", "replace"))
                else:
                    message = Delivery(row.seq, row.request_id, row.sample, (row.payload,))
                result = self._router.send(session.peer, encode(message))
                if result == "full":
                    return False
                if result == "gone":
                    self._drop(session)
                    return True
                session.cursor = row.seq
                session.sent += len(row.payload)
        return True

    def _flush(self, session: Session) -> bool:
        """Whether the outbox is empty now, or the session gone."""
        while session.outbox:
            result = self._router.send(session.peer, encode(session.outbox[0]))
            if result == "full":
                return False
            if result == "gone":
                self._drop(session)
                return True
            session.outbox.popleft()
        return True

    def _refuse(self, peer: bytes, text: str) -> None:
        self._router.send(peer, encode(Refused("", "transport", text[:1000])))

    def _drop(self, session: Session) -> None:
        session.outbox.clear()
        session.acks.clear()
        self._open.pop(session.peer, None)
