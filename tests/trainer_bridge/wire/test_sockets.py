"""Sockets: who may come in, and how a refusal, a dead peer or a broken handshake shows."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import zmq
from bridge_parts import ToyBackend, make_trajectory, request, weights

from blockroll.errors import InvalidInput, StorageError, TransportError
from blockroll.trainer_bridge.client import ClientKeys, CurveKeys, connect
from blockroll.trainer_bridge.gateway import Gateway
from blockroll.trainer_bridge.wire import messages
from blockroll.trainer_bridge.wire.gateway_socket import GatewaySocket
from blockroll.trainer_bridge.wire.keys import ServerKeys
from blockroll.trainer_bridge.wire.limits import TO_GATEWAY
from blockroll.trainer_bridge.wire.sockets import check_address, is_local, join_frames, split_frames

SERVER, DATA, CONTROL, STRANGER = (CurveKeys.generate() for _ in range(4))
SERVER_KEYS = ServerKeys(SERVER, frozenset({DATA.public}), frozenset({CONTROL.public}))
TRAINER = ClientKeys(SERVER.public, DATA, CONTROL)


@pytest.mark.parametrize("address, local", [
    ("tcp://127.0.0.1:5", True), ("tcp://127.9.9.9:*", True), ("tcp://[::1]:5", True), ("tcp://localhost:5", True),
    ("ipc:///tmp/x", True), ("tcp://0.0.0.0:5", False), ("tcp://*:5", False), ("tcp://eth0:5", False),
    ("tcp://10.0.0.1:5", False), ("tcp://127.0.0.1.evil.org:5", False), ("tcp://localhost.evil.org:5", False),
    ("tcp://127.0.0.1:5;10.0.0.1:5", False), ("tcp://[::]:5", False), ("udp://127.0.0.1:5", False)])
def test_what_counts_as_this_machine(address: str, local: bool) -> None:
    assert is_local(address) is local
    if not local:
        with pytest.raises(TransportError, match="address"):
            check_address(address, has_keys=False)


@pytest.mark.parametrize("address", [
    "", "tcp://", "127.0.0.1:5", "tcp://127.0.0.1", "udp://127.0.0.1:5", "tcp://a:5;b:6", "ws://a:1"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(TransportError, match="is not an address"):
        check_address(address, has_keys=True)


def test_no_open_port_without_keys(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="no CURVE keys"):
        Gateway(ToyBackend(), "tcp://0.0.0.0:*", tmp_path / "l").start()
    with pytest.raises(TransportError, match="no CURVE keys"):
        connect("tcp://192.0.2.1:5555")
    with pytest.raises(TransportError, match="cannot bind"):
        GatewaySocket("tcp://192.0.2.1:5", SERVER_KEYS, TO_GATEWAY)


def test_keys_are_kept_private_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    DATA.save(path)
    assert CurveKeys.load(path) == DATA
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert DATA.secret not in repr(DATA)
    with pytest.raises(StorageError):
        CurveKeys.generate().save(path)
    path.write_text("short")
    with pytest.raises(InvalidInput):
        CurveKeys.load(path)
    with pytest.raises(InvalidInput, match="separate keys"):
        ServerKeys(SERVER, frozenset({DATA.public}), frozenset({DATA.public}))


def test_admitted_keys_do_everything(serve: Callable[..., Gateway]) -> None:
    backend = ToyBackend()
    gateway = serve(backend, "tcp://0.0.0.0:*", keys=SERVER_KEYS)
    address = gateway.address.replace("0.0.0.0", "127.0.0.1")
    with connect(address, keys=TRAINER) as client:
        assert len(client.generate([request("a", 2)])) == 2
        assert client.push_weights(1, weights()) == 1
        assert client.status()["version"] == 1


@pytest.mark.parametrize("keys, why", [
    (ClientKeys(SERVER.public, STRANGER), "does not admit this client's key"),
    (ClientKeys(SERVER.public, CONTROL), "not allowed on the data plane"),
    (ClientKeys(STRANGER.public, DATA), "breaks off every handshake"),
    (None, "CURVE keys")])  # libzmq tells why, or only that the line broke
def test_other_keys_are_refused_within_seconds(
        serve: Callable[..., Gateway], keys: ClientKeys | None, why: str) -> None:
    gateway = serve(ToyBackend(), keys=SERVER_KEYS)
    since = time.monotonic()
    with pytest.raises(TransportError, match=why):
        connect(gateway.address, keys=keys, timeout=20.0)
    assert time.monotonic() - since < 6.0


def test_control_plane_needs_the_control_key(serve: Callable[..., Gateway]) -> None:
    backend = ToyBackend()
    gateway = serve(backend, keys=SERVER_KEYS)
    with connect(gateway.address, keys=ClientKeys(SERVER.public, DATA)) as client:
        with pytest.raises(TransportError, match="control key"):
            client.push_weights(1, weights())
    with connect(gateway.address, keys=ClientKeys(SERVER.public, DATA, DATA)) as client:
        with pytest.raises(TransportError, match="not allowed on the control plane"):
            client.shutdown_gateway()
        with pytest.raises(TransportError, match="not allowed on the control plane"):
            client.push_weights(1, weights())
        assert client.status()["version"] == backend.version == 0


def test_client_id_of_another_key_is_refused(serve: Callable[..., Gateway]) -> None:
    other = CurveKeys.generate()
    gateway = serve(ToyBackend(), keys=ServerKeys(SERVER, frozenset({DATA.public, other.public})))
    connect(gateway.address, client_id="t", keys=TRAINER).close()
    with pytest.raises(TransportError, match="belongs to another key"):
        connect(gateway.address, client_id="t", keys=ClientKeys(SERVER.public, other))


def test_a_second_connection_takes_a_client_id_over(serve: Callable[..., Gateway]) -> None:
    gateway = serve(ToyBackend())
    with connect(gateway.address, client_id="t") as first, connect(gateway.address, client_id="t") as second:
        with pytest.raises(TransportError, match="took over"):
            first.status()
        assert second.status()["sessions"] == 1


def test_silence_ends_in_an_error_in_time() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as mute:
        port = mute.bind_to_random_port("tcp://127.0.0.1")
        for address in (f"tcp://127.0.0.1:{port}", "tcp://127.0.0.1:1"):
            since = time.monotonic()
            with pytest.raises(TransportError, match="has not answered"):
                connect(address, timeout=0.6)
            assert time.monotonic() - since < 4.0


@pytest.mark.parametrize("frames", [[], [b""], [b"ab"], [b"a", b"", b"bc"], [b"x"] * 33])
def test_joined_frames_come_apart_again(frames: list[bytes]) -> None:
    joined = join_frames(frames)
    assert [bytes(f) for f in split_frames(joined)] == frames
    for bad in (joined[:-1], joined + b"\0", b"\xff\xff\xff\xff" + joined[4:]):
        with pytest.raises(TransportError, match="malformed message"):
            split_frames(bad)


def peer(context: zmq.Context[Any], address: str) -> zmq.Socket[Any]:
    socket = context.socket(zmq.DEALER)
    socket.connect(address)
    socket.rcvtimeo, socket.linger = 5000, 0
    return socket


def answer(rude: zmq.Socket[Any]) -> messages.Message:
    """The gateway's next word that is no sign of life."""
    while isinstance(message := messages.decode(split_frames(rude.recv())), messages.Pong):
        pass
    return message


def test_hostile_peers_do_not_disturb_others(serve: Callable[..., Gateway]) -> None:
    gateway = serve(ToyBackend())
    with connect(gateway.address) as client, zmq.Context() as context:
        with peer(context, gateway.address) as rude:
            for frames in ([b"\xdd\xff\xff\xff\xff"], [b""], [b"x"] * 500, messages.encode(messages.Welcome("a", 1))):
                rude.send_multipart(frames)
                assert isinstance(answer(rude), messages.Refused | messages.Reset)
            rude.send_multipart(messages.encode(messages.Submit("b", 0, True, (b"x",))))
            assert isinstance(answer(rude), messages.Reset)
            rude.send_multipart(messages.encode(messages.Hello("rude", False, 1000, "", 0)))
            assert isinstance(answer(rude), messages.Welcome)
            for bad in (messages.Submit("b", 0, True, (b"x",)), messages.PushCommit("p"), messages.Shutdown()):
                rude.send_multipart(messages.encode(bad))
                assert isinstance(answer(rude), messages.Refused)
        with peer(context, gateway.address) as huge:
            huge.send(b"x" * (TO_GATEWAY + 1))
            with pytest.raises(zmq.Again):
                huge.rcvtimeo = 500
                huge.recv()
        assert client.generate([request("a")])[0].key == ("a", 0)
        assert client.status()["malformed"] == 4


def test_garbage_on_the_port_is_shaken_off(serve: Callable[..., Gateway]) -> None:
    gateway = serve(ToyBackend(), keys=SERVER_KEYS)
    where = ("127.0.0.1", int(gateway.address.rpartition(":")[2]))
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00"
    for bad in (b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(1000), greeting, greeting + b"NULL".ljust(52, b"\0"),
                greeting + b"CURVE".ljust(52, b"\0") + os.urandom(300), b"\xff" * 64):
        with socket.create_connection(where, timeout=5) as rude:
            rude.sendall(bad)
            rude.settimeout(0.1)
            with suppress(OSError):
                rude.recv(1000)
    with connect(gateway.address, keys=TRAINER) as client:
        assert client.generate([request("a")])[0].key == ("a", 0)


FLOODED = """
import time, zmq
from blockroll.trainer_bridge.wire.gateway_socket import GatewaySocket
router = GatewaySocket("tcp://127.0.0.1:*", None, 1000)
with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
    peer.linger, peer.sndhwm, peer.rcvhwm, peer.rcvbuf = 0, 0, 1, 4096
    peer.connect(router.address)
    for _ in range(100_000):
        peer.send(b"x" * 100)
    while (first := router.receive()) is None:
        time.sleep(0.01)
    for _ in range(100):
        router.send(first.peer, [b"y" * 10_000])
    time.sleep(0.3)
time.sleep(2.5)
print("alive", flush=True)
router.close()
"""


def test_a_flooding_peer_that_resets_its_connection_does_not_end_the_process() -> None:
    """With ZMTP heartbeats every two seconds libzmq aborts here."""
    done = subprocess.run([sys.executable, "-c", FLOODED], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("alive\n", 0), done.stderr


def test_a_peer_that_never_reads_is_forgotten(monkeypatch: pytest.MonkeyPatch, serve: Callable[..., Gateway]) -> None:
    monkeypatch.setattr("blockroll.trainer_bridge.gateway.gateway.LINGER_S", 0.2)
    gateway = serve(ToyBackend())
    with connect(gateway.address) as client, zmq.Context() as context, context.socket(zmq.DEALER) as deaf:
        deaf.rcvhwm, deaf.rcvbuf, deaf.linger = 1, 4096, 0
        deaf.connect(gateway.address)
        deaf.send_multipart(messages.encode(messages.Hello("deaf", False, 1 << 40, "", 0)))
        deaf.sndtimeo = 2000
        for number in range(20_000):
            deaf.send_multipart(messages.encode(messages.StatusRequest(number)))
        deadline = time.monotonic() + 10
        while client.status()["sessions"] != 1:
            assert time.monotonic() < deadline


def test_many_trajectories_flow_within_a_small_window(
        serve: Callable[..., Gateway], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockroll.trainer_bridge.client.message_loop.WINDOW", 20_000)
    gateway = serve(ToyBackend(), max_in_flight=16)
    with connect(gateway.address) as client:
        client.submit([request(f"r{i}", 4, max_tokens=200) for i in range(40)])
        seen = set()
        for trajectory in client.results():
            seen.add(trajectory.key)
            assert client._pending.inbox_bytes < 20_000 + 10_000
        assert len(seen) == 160
        assert client.delivery["missing"] == 0


def test_trajectories_are_what_the_backend_made(serve: Callable[..., Gateway]) -> None:
    from bridge_parts import assert_same

    with connect(serve(ToyBackend(), f"ipc://@blockroll-{os.getpid()}").address) as client:
        asked = request("a", 3, routed_experts=True, top_k=4)
        for trajectory in client.generate([asked]):
            assert_same(trajectory, make_trajectory(asked, trajectory.sample))
