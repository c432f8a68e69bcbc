"""The clients that are connected to a gateway, and what is queued for each.

Invariants:
- Messages to one client leave in the order they were sent.
- A message is sent, or stays queued while the peer has no room, or is dropped together with its session when the peer
  is gone or does not read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ...errors import StorageError
from ..wire.gateway_socket import GatewaySocket, Sent
from ..wire.messages import Ack, Message, Refused, encode

MAX_SESSIONS, MAX_OUTBOX = 1024, 256


@dataclass
class Session:
    """One client's session.

    Attributes:
        peer, key: its connection, and the public key of that connection.
        control: whether it is a control session.
        granted, sent: bytes of deliveries that its credit allows, and that were sent.
        cursor, more: number of the last delivery sent, and whether the ledger may hold deliveries after it.
        outbox: messages for which the peer had no room.
        acks, ack_error: acknowledgements the ledger has not recorded, and why the disk refused the oldest of them.
        asked_to_stop: whether this client has sent Shutdown.
        refused: names of batches of which a part was refused, and what was said then.
    """

    peer: bytes
    client: str
    key: str
    control: bool
    granted: int
    sent: int = 0
    cursor: int = 0
    more: bool = True
    asked_to_stop: bool = False
    ack_error: StorageError | None = None
    outbox: deque[Message] = field(default_factory=deque)
    acks: deque[Ack] = field(default_factory=deque)
    refused: dict[str, Refused] = field(default_factory=dict)


class Sessions:
    """Every open session of a gateway, by connection. Used from the gateway's thread alone."""

    def __init__(self, socket: GatewaySocket) -> None:
        self.socket = socket
        self._open: dict[bytes, Session] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Session]:
        """The open sessions. They may be dropped while the caller iterates."""
        return iter(list(self._open.values()))

    def __contains__(self, session: Session) -> bool:
        return self._open.get(session.peer) is session

    @property
    def full(self) -> bool:
        """Whether no further session is accepted."""
        return len(self._open) >= MAX_SESSIONS

    def open(self, session: Session) -> None:
        """Adds a session."""
        self._open[session.peer] = session

    def find(self, peer: bytes, key: str) -> Session | None:
        """The session of a connection, if it was opened under this key."""
        session = self._open.get(peer)
        return session if session is not None and session.key == key else None

    def reply(self, peer: bytes, message: Message) -> None:
        """Sends a message within the session of a connection, if it has one; queues it while the peer has no room."""
        session = self._open.get(peer)
        if session is None:
            return
        session.outbox.append(message)
        if len(session.outbox) > MAX_OUTBOX:
            self.drop(session)
        else:
            self.flush(session)

    def flush(self, session: Session) -> bool:
        """Sends what is queued; whether nothing is queued any more, or the session is gone."""
        while session.outbox:
            result = self.tell_peer(session.peer, session.outbox[0])
            if result == "full":
                return False
            if result == "gone":
                self.drop(session)
                return True
            session.outbox.popleft()
        return True

    def tell_peer(self, peer: bytes, message: Message) -> Sent:
        """Sends a message to a peer, with or without a session, and queues nothing."""
        return self.socket.send(peer, encode(message))

    def tell(self, sessions: Iterable[Session], message: Message) -> int:
        """Sends a message to each of these sessions and drops those whose peer is gone; returns how many are left."""
        left = 0
        for session in list(sessions):
            if self.tell_peer(session.peer, message) == "gone":
                self.drop(session)
            else:
                left += 1
        return left

    def drop(self, session: Session) -> None:
        """Forgets a session. Its client opens another one and repeats what was not confirmed."""
        session.outbox.clear()
        session.acks.clear()
        self._open.pop(session.peer, None)
