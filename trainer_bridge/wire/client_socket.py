"""The client's end of a connection: one ZeroMQ DEALER and its monitor."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Sequence

import zmq

from ...errors import TransportError
from .codec import Buffer
from .keys import CurveKeys
from .sockets import QUEUE, check_address, set_limits, split_frames

_MONITORED = (zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
              | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)


class ClientSocket:
    """A client's connection to a gateway: one DEALER and its monitor. One thread at a time."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, server: str | None, own: CurveKeys | None,
                 max_frame: int) -> None:
        check_address(address, own is not None)
        self.address, self.lost, self.connected, self.failed_handshakes = address, False, False, 0
        self._socket = context.socket(zmq.DEALER)
        set_limits(self._socket, address, max_frame)
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

    def poll(self, wait: float, wake: int) -> None:
        """Waits at most `wait` seconds until a message, an event or a byte on the file descriptor `wake` has arrived."""
        self._poller.register(wake, zmq.POLLIN)
        self._poller.poll(int(wait * 1000))

    def receive(self, wait: float) -> list[list[memoryview]]:
        """The messages that have arrived; waits at most `wait` seconds for the first."""
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
            # The first 16 bits are the event. zmq.utils.monitor reads it too, but imports asyncio: 50 ms for every client.
            event = struct.unpack_from("=H", self._monitor.recv_multipart()[0])[0]
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
        """Closes the socket; queued messages are lost."""
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)
