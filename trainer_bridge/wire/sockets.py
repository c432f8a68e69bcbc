"""What the sockets of both ends share: addresses, options that bound their memory, and the joining of frames.

Invariants:
- Beyond loopback and ipc a socket needs CURVE keys (`keys`).
- Every queue and every frame has a limit. A full queue is reported to the caller; nothing is dropped from it.
- No message is lost silently: a send to a peer that is gone returns "gone"; a lost connection or a failed handshake is
  seen.
- A message to a client is one ZeroMQ frame, into which its own frames are joined. A DEALER whose connection breaks
  between two frames of a message aborts the process (`Assertion failed: !_more`, zeromq/libzmq#3485); one frame cannot
  break so.

A dead connection shows through TCP keepalive and the user timeout here, and through Ping and Pong in the sessions.
ZMTP's own
heartbeats stay off: in libzmq 4.3 they abort the process (`Assertion failed: !_io_error`, zeromq/libzmq#4364) when a
peer disconnects whose messages wait behind a full queue, so any peer could end a gateway.
Sockets do not deliver across connections: the ledger keeps what is unacknowledged, and clients submit again.
A peer that passed the allow-list can still make libzmq buffer one endless multi-part message: list only keys you trust.
"""

from __future__ import annotations

import ipaddress
import re
import struct
from collections.abc import Sequence

import zmq

from ...errors import TransportError
from .codec import Buffer, refuse
from .limits import MAX_FRAMES

HANDSHAKE_MS, DEAD_MS = 5_000, 15_000
QUEUE = 64
"""Messages that wait in each direction."""


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


def set_limits(socket: zmq.Socket[bytes], address: str, max_frame: int) -> None:
    """Sets what bounds a socket's memory and its waiting; `max_frame` in bytes."""
    for option, value in (
            (zmq.SNDHWM, QUEUE), (zmq.RCVHWM, QUEUE), (zmq.MAXMSGSIZE, max_frame), (zmq.LINGER, 0),
            (zmq.HANDSHAKE_IVL, HANDSHAKE_MS), (zmq.TCP_KEEPALIVE, 1), (zmq.TCP_KEEPALIVE_IDLE, 10),
            (zmq.TCP_KEEPALIVE_INTVL, 5), (zmq.TCP_KEEPALIVE_CNT, 3), (zmq.TCP_MAXRT, DEAD_MS),
            (zmq.IPV6, int("[" in address))):
        socket.setsockopt(option, value)


def join_frames(frames: Sequence[Buffer]) -> bytes:
    """The frames as one frame: their count and lengths (uint32, little-endian), then their bytes."""
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
