"""The gateway's end of all connections: one ZeroMQ ROUTER."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import zmq

from ...errors import TransportError
from .codec import Buffer
from .keys import ServerKeys
from .limits import MAX_FRAMES
from .sockets import check_address, join_frames, set_limits

_DOMAIN = "blockroll"
Sent = Literal["sent", "full", "gone"]


@dataclass(frozen=True)
class Inbound:
    """A message at the gateway, the connection it came by, and that connection's public key (empty without CURVE)."""

    peer: bytes
    key: str
    frames: list[memoryview]


class GatewaySocket:
    """The gateway's socket: ROUTER with ROUTER_MANDATORY and a ZAP allow-list. One thread at a time."""

    def __init__(self, address: str, keys: ServerKeys | None, max_frame: int) -> None:
        check_address(address, keys is not None)
        self.keys = keys
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._auth = None
        self.socket = self._context.socket(zmq.ROUTER)
        set_limits(self.socket, address, max_frame)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if keys is not None:
            from zmq.auth.thread import ThreadAuthenticator

            self._auth = ThreadAuthenticator(self._context)
            self._auth.configure_curve_callback(_DOMAIN, credentials_provider=keys)
            self._auth.start()
            self.socket.zap_domain = _DOMAIN.encode()
            self.socket.curve_server = True
            self.socket.curve_publickey = keys.own.public.encode()
            self.socket.curve_secretkey = keys.own.secret.encode()
        try:
            self.socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise TransportError(f"address: cannot bind {address} ({error.strerror}); "
                                 "choose a free port of this machine") from error
        self.address = cast(bytes, self.socket.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()

    def receive(self) -> Inbound | None:
        """The next message; None when there is none. A message with too many frames comes with no frames."""
        try:
            frames = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        peer = frames[0].bytes
        key = str(frames[-1].get("User-Id")) if self.keys is not None else ""
        if len(frames) - 1 > MAX_FRAMES:
            frames = frames[:1]
        return Inbound(peer, key, [f.buffer for f in frames[1:]])

    def send(self, peer: bytes, frames: Sequence[Buffer]) -> Sent:
        """Queues a message for a peer. "full": its queue has no room now; "gone": it has disconnected."""
        try:
            self.socket.send_multipart([peer, join_frames(frames)], zmq.NOBLOCK)
            return "sent"
        except zmq.Again:
            return "full"
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return "gone"

    def close(self, linger: float = 0.0) -> None:
        """Closes the socket; queued messages have `linger` seconds to leave."""
        self.socket.close(int(linger * 1000))
        if self._auth is not None:
            self._auth.stop()
        self._context.term()
