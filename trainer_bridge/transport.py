"""The two ends of a connection: sockets that bound their memory, know their peer and notice when it is gone.

Invariants:
- Outside loopback and ipc a socket is bound or connected with CURVE keys (`keys`) or not at all.
- Every queue and every frame has a limit; a full queue is told to the caller, never dropped from.
- No message is lost silently: a send to a peer that is gone says so, a lost connection or a failed handshake is observed.
- Towards a client a message is one frame of ZeroMQ, its own frames joined. A DEALER whose line breaks between two frames
  of a message it is reading aborts the process (`Assertion failed: !_more`, zeromq/libzmq#3485); here there are no two.

A dead link shows through TCP keepalive and user timeout here, through Ping and Pong above. ZMTP's own heartbeats stay off:
in libzmq 4.3 they abort the process (`Assertion failed: !_io_error`, zeromq/libzmq#4364) when a peer whose messages wait
behind a full queue disconnects, so any peer could end a gateway.
Delivery across connections is not this module's business: the ledger keeps what is unacknowledged, clients submit again.
A peer that passed the allow-list can still make libzmq buffer one endless multi-part message: list only keys you trust.
"""

from __future__ import annotations

import ipaddress
import os
import re
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import zmq
from zmq.utils.monitor import recv_monitor_message

from ..errors import TransportError
from .codec import Buffer, refuse
from .keys import CurveKeys, ServerKeys
from .messages import MAX_FRAMES

HANDSHAKE_MS, DEAD_MS = 5_000, 15_000
QUEUE = 64
_DOMAIN = "blockroll"
_MONITORED = (zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
              | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
Sent = Literal["sent", "full", "gone"]


def is_local(address: str) -> bool:
    """Whether only this machine can reach the address: ipc, inproc, or TCP on a loopback address."""
    scheme, _, rest = address.partition("://")
    if scheme in ("ipc", "inproc"):
        return bool(rest)
    host = rest.rpartition(":")[0].strip("[]")
    if scheme != "tcp" or ";" in rest:
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_address(address: str, has_keys: bool) -> None:
    """Raises TransportError for an address of another kind, or one that needs keys and has none."""
    if not re.fullmatch(r"(tcp://[^;\s]+:(\d+|\*)|ipc://\S+|inproc://\S+)", address):
        raise TransportError(f"address: {address!r} is not an address of the bridge; use tcp://HOST:PORT or ipc://PATH")
    if not is_local(address) and not has_keys:
        raise TransportError(f"address: {address} can be reached from other machines and no CURVE keys are given; "
                             "give keys, or use tcp://127.0.0.1:PORT or ipc://PATH")


def _bound(socket: zmq.Socket[bytes], address: str, max_frame: int) -> None:
    for option, value in (
            (zmq.SNDHWM, QUEUE), (zmq.RCVHWM, QUEUE), (zmq.MAXMSGSIZE, max_frame), (zmq.LINGER, 0),
            (zmq.HANDSHAKE_IVL, HANDSHAKE_MS), (zmq.TCP_KEEPALIVE, 1), (zmq.TCP_KEEPALIVE_IDLE, 10),
            (zmq.TCP_KEEPALIVE_INTVL, 5), (zmq.TCP_KEEPALIVE_CNT, 3), (zmq.TCP_MAXRT, DEAD_MS),
            (zmq.IPV6, int("[" in address))):
        socket.setsockopt(option, value)


def join_frames(frames: Sequence[Buffer]) -> bytes:
    """The frames as one: their count and lengths (uint32, little-endian), then their bytes."""
    lengths = [memoryview(frame).nbytes for frame in frames]
    return b"".join([struct.pack(f"<{1 + len(lengths)}I", len(lengths), *lengths), *frames])


def split_frames(joined: Buffer) -> list[memoryview]:
    """The frames of `join_frames`, without a copy. Raises TransportError for anything else."""
    view = memoryview(joined)
    count = int.from_bytes(view[:4], "little")
    start = 4 + 4 * count
    if len(view) < 4 or count > MAX_FRAMES or len(view) < start:
        raise refuse("message", f"{len(view)} bytes that are no joined frames")
    frames = []
    for length in struct.unpack(f"<{count}I", view[4:start]):
        frames.append(view[start:start + length])
        start += length
    if start != len(view):
        raise refuse("message", f"{len(view)} bytes where its frames have {start}")
    return frames


class Link:
    """A client's connection to a gateway: one DEALER and its monitor. One thread at a time."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, server: str | None, own: CurveKeys | None,
                 max_frame: int) -> None:
        check_address(address, own is not None)
        self.address, self.lost, self.connected, self.failed_handshakes = address, False, False, 0
        self._socket = context.socket(zmq.DEALER)
        _bound(self._socket, address, max_frame)
        for option, value in ((zmq.IMMEDIATE, 1), (zmq.RECONNECT_IVL, 100), (zmq.RECONNECT_IVL_MAX, 2_000)):
            self._socket.setsockopt(option, value)
        self._socket.setsockopt(zmq.ROUTING_ID, b"c" + os.urandom(15))
        if own is not None and server is not None:
            self._socket.curve_serverkey = server.encode()
            self._socket.curve_publickey, self._socket.curve_secretkey = own.public.encode(), own.secret.encode()
        self._monitor = self._socket.get_monitor_socket(_MONITORED)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._socket.connect(address)

    def send(self, frames: Sequence[Buffer], wait: float) -> bool:
        """Queues a message; False when the queue stayed full, or nobody was connected, for `wait` seconds."""
        deadline = time.monotonic() + wait
        while True:
            try:
                self._socket.send_multipart(frames, zmq.NOBLOCK, copy=True)
                return True
            except zmq.Again:
                self.observe()
                left = deadline - time.monotonic()
                if self.lost or left <= 0:
                    return False
                self._socket.poll(int(min(left, 0.1) * 1000) + 1, zmq.POLLOUT)

    def receive(self, wait: float) -> list[list[memoryview]]:
        """Messages that are there, after waiting `wait` seconds for the first."""
        self._poller.poll(int(wait * 1000))
        self.observe()
        found: list[list[memoryview]] = []
        while len(found) < QUEUE:
            try:
                found.append(split_frames(self._socket.recv(zmq.NOBLOCK)))
            except zmq.Again:
                break
        return found

    def observe(self) -> None:
        """Reads the monitor. Raises TransportError when the gateway does not admit this key or has other security."""
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                raise TransportError(f"gateway {self.address} does not admit this client's key; "
                                     "add its public key to the gateway's allow-list")
            if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                raise TransportError(f"{self.address} breaks off the handshake: one side has CURVE keys and the other "
                                     "has none, or it is no gateway; give both sides keys or neither")
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.connected, self.failed_handshakes = True, 0
            elif event == zmq.EVENT_DISCONNECTED:
                self.lost = self.lost or self.connected
            else:
                self.failed_handshakes += 1

    def close(self) -> None:
        """Closes; what is queued is lost."""
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)


@dataclass(frozen=True)
class Inbound:
    """A message at the gateway: whose connection it came by, under which public key (empty without CURVE)."""

    peer: bytes
    key: str
    frames: list[memoryview]


class Router:
    """The gateway's socket: ROUTER with ROUTER_MANDATORY and a ZAP allow-list. One thread at a time."""

    def __init__(self, address: str, keys: ServerKeys | None, max_frame: int) -> None:
        check_address(address, keys is not None)
        self.keys = keys
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._auth = None
        self.socket = self._context.socket(zmq.ROUTER)
        _bound(self.socket, address, max_frame)
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
        """The next message; None when there is none. One with too many frames comes without any."""
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
        """Queues a message for a peer, or says why not; never drops one."""
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
        """Closes the socket; what is queued has `linger` seconds to leave."""
        self.socket.close(int(linger * 1000))
        if self._auth is not None:
            self._auth.stop()
        self._context.term()
