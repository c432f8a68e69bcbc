"""A client's session with a gateway: Hello, Welcome, and noticing when it is over.

Invariants:
- A session lives on one connection. When the connection breaks, the gateway forgets the session or falls silent, the
  session is over (SessionLost) and the next one starts on a new socket: nothing of an old one can arrive in a new one.
- Silence of the gateway for `timeout` seconds is a TransportError, refusal is one at once; neither is waited out.
"""

from __future__ import annotations

import time

import zmq

from ..errors import BlockrollError, ClusterError, RequestError, StorageError, TransportError
from .keys import ClientKeys
from .messages import TO_CLIENT, Hello, Message, Ping, Pong, Refused, Reset, Welcome, decode, encode
from .transport import Link

PING_S = 1.0
SILENCE_S = 10.0
SESSION_S = 0.2
"""Least time between two sessions of a client, seconds."""
_HANDSHAKES = 5


class SessionLost(Exception):
    """The session is over and another one may be opened. Never leaves the bridge."""


class RequestRefused(RequestError):
    """The service cannot serve one request; `request_id` names it. `others`: more requests of the same call it cannot serve."""

    others: tuple[RequestRefused, ...] = ()

    def __init__(self, request_id: str, why: str) -> None:
        self.request_id, self.why = request_id, why
        super().__init__(f"request {request_id!r}", why, "a changed request needs a new id; the other requests go on")

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # type: ignore[override]  # fewer arguments
        return type(self), (self.request_id, self.why)


def refusal(message: Refused) -> BlockrollError:
    """The exception a refusal stands for."""
    if message.error == "request":
        return RequestError("request", message.text, "change it and give it a new id")
    return {"storage": StorageError, "cluster": ClusterError}.get(message.error, TransportError)(message.text)


class Connection:
    """Sessions of one client with one gateway, one at a time. One thread at a time.

    Args:
        control: open sessions of the control plane, with the control key.
        timeout: seconds without a word from the gateway after which waiting ends with TransportError.
    """

    def __init__(self, address: str, client_id: str, *, keys: ClientKeys | None, control: bool, timeout: float) -> None:
        self.address, self.version, self.ledger, self.notice = address, 0, "", ""
        self._client_id, self._keys, self._control, self._timeout = client_id, keys, control, timeout
        self._own = None if keys is None else keys.control if control else keys.data
        if keys is not None and self._own is None:
            raise TransportError(f"pushing weights to {address} or stopping it needs a control key; "
                                 "give ClientKeys(control=...)")
        # The process's own context, never terminated: a client nobody closed must not hang the interpreter's exit.
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._link: Link | None = None
        self._early: list[list[memoryview]] = []
        self._opened = self._pinged = self._heard = 0.0
        self.begin()

    @property
    def is_open(self) -> bool:
        return self._link is not None

    def begin(self) -> None:
        """Starts the clock of `timeout`: the caller was busy elsewhere, the gateway was not silent."""
        self._heard = time.monotonic()

    def open(self, credit: int = 0, cursor: int = 0) -> None:
        """Opens a session; `cursor` counts for the ledger the last one was with.

        Raises TransportError when the gateway does not answer in time or refuses, SessionLost when it breaks.
        """
        self.drop()
        time.sleep(max(0.0, self._opened + SESSION_S - time.monotonic()))
        self._opened = time.monotonic()
        server = None if self._keys is None else self._keys.server
        link = self._link = Link(self._context, self.address, server, self._own, TO_CLIENT)
        hello = encode(Hello(self._client_id, self._control, credit, self.ledger, cursor))
        try:
            deadline = time.monotonic() + SILENCE_S
            while not link.send(hello, PING_S):
                self._check(link)
                if link.lost or time.monotonic() > deadline:
                    raise SessionLost
            while time.monotonic() < deadline:
                arrived = link.receive(PING_S)
                if arrived:
                    message = decode(arrived[0])
                    if isinstance(message, Welcome):
                        self._heard, self.version, self._early = time.monotonic(), message.version, arrived[1:]
                        self.ledger = message.ledger
                        return
                    if isinstance(message, Refused):
                        raise refusal(message)
                self._check(link)
                if link.lost:
                    raise SessionLost
            raise SessionLost
        except BaseException:
            self.drop()
            raise

    def send(self, message: Message) -> None:
        """Queues a message for the gateway. Raises SessionLost when it cannot leave, or what the gateway said last."""
        if self._link is None:
            raise SessionLost
        if not self._link.send(encode(message), SILENCE_S):
            for frames in self._link.receive(0.0):
                last = decode(frames)
                if isinstance(last, Refused) and not last.about:
                    raise refusal(last)
            raise SessionLost

    def receive(self, wait: float) -> list[Message]:
        """Messages of this session, after at most `wait` seconds; [] is ordinary."""
        if self._link is None:
            raise SessionLost
        early, self._early = self._early, []
        arrived, now = early + self._link.receive(0.0 if early else wait), time.monotonic()
        if self._link.lost and not arrived:
            raise SessionLost
        found = []
        for frames in arrived:
            self._heard = now
            message = decode(frames)
            if isinstance(message, Reset):
                raise SessionLost
            if isinstance(message, Refused) and not message.about:
                raise refusal(message)
            if isinstance(message, Pong):
                # It may have waited here while another connection pushed a newer version.
                self.version, self.notice = max(self.version, message.version), message.notice
            else:
                found.append(message)
        if now - self._heard > SILENCE_S:
            raise SessionLost
        if now - max(self._heard, self._pinged) > PING_S:
            self._pinged = now
            self.send(Ping())
        return found

    def drop(self) -> None:
        """Ends the session here, without a word."""
        link, self._link, self._early = self._link, None, []
        if link is not None:
            link.close()

    def _check(self, link: Link) -> None:
        if link.failed_handshakes >= _HANDSHAKES:
            raise TransportError(f"gateway {self.address} breaks off every handshake; check that it is a blockroll "
                                 "gateway, that both sides use CURVE keys or neither does, and its public key")
        silent = time.monotonic() - self._heard
        if silent > self._timeout:
            raise TransportError(f"gateway {self.address} has not answered for {silent:.0f} s; check that it runs and "
                                 "can be reached, then connect again with the same client_id to go on")
