"""Opens a client's session with a gateway and notices when the session is over.

Invariants:
- A session lives on one socket. When the connection breaks, or the gateway forgets the session or falls silent, the
  session is over (SessionLost). The next session has a new socket, so no message of an old session arrives in it.
- When the gateway is silent for `timeout` seconds, or refuses the session, TransportError is raised.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from socket import socketpair

import zmq

from ...errors import BlockrollError, ClusterError, RequestError, StorageError, TransportError
from ..wire.client_socket import ClientSocket
from ..wire.keys import ClientKeys
from ..wire.limits import TO_CLIENT
from ..wire.messages import Hello, Message, Ping, Pong, Refused, Reset, Welcome, decode, encode

_log = logging.getLogger(__package__)
PING_S = 1.0
"""Seconds without a message after which the client sends Ping."""
SILENCE_S = 10.0
"""Seconds without a message after which the session is lost."""
SESSION_S = 0.2
"""Least time between the starts of two sessions of a client, seconds."""
_HANDSHAKES = 5
"""Failed handshakes after which the client gives up."""


class SessionLost(Exception):
    """The session is over and another one may be opened. Never leaves the bridge."""


class RequestRefused(RequestError):
    """The service cannot serve the request `request_id`. `others`: the refusals of further requests of the same
    call."""

    others: tuple[RequestRefused, ...] = ()

    def __init__(self, request_id: str, why: str) -> None:
        self.request_id, self.why = request_id, why
        super().__init__(f"request {request_id!r}", why, "a changed request needs a new id; the other requests go on")

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # type: ignore[override]  # fewer arguments
        return type(self), (self.request_id, self.why)


def refusal(message: Refused) -> BlockrollError:
    """The exception that a Refused message tells the client to raise."""
    if message.error == "request":
        return RequestError("request", message.text, "change it and give it a new id")
    return {"storage": StorageError, "cluster": ClusterError}.get(message.error, TransportError)(message.text)


class Connection:
    """Opens sessions of one client with one gateway, one at a time. One thread at a time.

    Args:
        control: open control sessions, with the control key.
        timeout: seconds without a message from the gateway after which waiting ends with TransportError.
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
        self._socket: ClientSocket | None = None
        self._early: list[list[memoryview]] = []
        self._waker, self._woken = socketpair()
        self._waker.setblocking(False)
        self._woken.setblocking(False)
        self._opened = self._pinged = self._heard = 0.0
        self.restart_timeout()

    @property
    def is_open(self) -> bool:
        return self._socket is not None

    def restart_timeout(self) -> None:
        """Starts `timeout` anew. The caller was busy elsewhere, so the gateway had no occasion to send anything."""
        self._heard = time.monotonic()

    def open(self, credit: int = 0, cursor: int = 0) -> None:
        """Opens a session.

        Args:
            credit: see messages.Credit.
            cursor: number of the last delivery received from the ledger of the last session.

        Raises TransportError when the gateway does not answer in time or refuses, SessionLost when it breaks.
        """
        self.drop()
        time.sleep(max(0.0, self._opened + SESSION_S - time.monotonic()))
        self._opened = time.monotonic()
        server = None if self._keys is None else self._keys.server
        socket = self._socket = ClientSocket(self._context, self.address, server, self._own, TO_CLIENT)
        hello = encode(Hello(self._client_id, self._control, credit, self.ledger, cursor))
        try:
            deadline = time.monotonic() + SILENCE_S
            while not socket.send(hello, PING_S):
                self._check(socket)
                if socket.lost or time.monotonic() > deadline:
                    raise SessionLost
            while time.monotonic() < deadline:
                arrived = socket.receive(PING_S)
                if arrived:
                    message = decode(arrived[0])
                    if isinstance(message, Welcome):
                        self._heard, self.version, self._early = time.monotonic(), message.version, arrived[1:]
                        self.ledger = message.ledger
                        _log.info("session of %s with %s is open", self._client_id, self.address)
                        return
                    if isinstance(message, Refused):
                        raise refusal(message)
                self._check(socket)
                if socket.lost:
                    raise SessionLost
            raise SessionLost
        except BaseException:
            self.drop()
            raise

    def send(self, message: Message) -> None:
        """Queues a message for the gateway. Raises SessionLost when it cannot be sent, or the refusal that ended the
        session."""
        if self._socket is None:
            raise SessionLost
        if not self._socket.send(encode(message), SILENCE_S):
            for frames in self._socket.receive(0.0):
                last = decode(frames)
                if isinstance(last, Refused) and not last.about:
                    raise refusal(last)
            raise SessionLost

    def wait(self, seconds: float) -> None:
        """Waits until a message has arrived or `wake` is called. It changes nothing, so other threads may do so meanwhile."""
        if self._socket is not None and not self._early:
            self._socket.poll(seconds, self._woken.fileno())
        with suppress(BlockingIOError):
            self._woken.recv(4096)

    def wake(self) -> None:
        """Ends a `wait` of another thread. Any thread may call it, at any time."""
        with suppress(OSError):
            self._waker.send(b"!")

    def close(self) -> None:
        """Drops the session and frees the connection for good. No thread may be in `wait`."""
        self.drop()
        self._waker.close()
        self._woken.close()

    def receive(self, wait: float) -> list[Message]:
        """The messages that have arrived in this session; waits at most `wait` seconds for the first."""
        if self._socket is None:
            raise SessionLost
        early, self._early = self._early, []
        arrived, now = early + self._socket.receive(0.0 if early else wait), time.monotonic()
        if self._socket.lost and not arrived:
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
                # This Pong may have waited here while a control session pushed a newer version.
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
        """Ends the session on this side; the gateway is not told."""
        socket, self._socket, self._early = self._socket, None, []
        if socket is not None:
            socket.close()

    def _check(self, socket: ClientSocket) -> None:
        if socket.failed_handshakes >= _HANDSHAKES:
            raise TransportError(f"gateway {self.address} breaks off every handshake; check that it is a blockroll "
                                 "gateway, that both sides use CURVE keys or neither does, and its public key")
        silent = time.monotonic() - self._heard
        if silent > self._timeout:
            raise TransportError(f"gateway {self.address} has not answered for {silent:.0f} s; check that it runs and "
                                 "can be reached, then connect again with the same client_id to go on")
