"""Kills and cut lines: requested = unique, nothing missing, duplicates dropped, weights whole."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bridge_parts import Served, ToyBackend, assert_same, make_trajectory, request

from blockroll.trainer_bridge.client import connect
from blockroll.trainer_bridge.client.host_weights import HostWeights
from blockroll.trainer_bridge.gateway import Gateway

HERE = Path(__file__).parent


def test_gateway_killed_again_and_again(served: Callable[..., Served]) -> None:
    gateway = served(400.0)
    asked = {f"r{i}": request(f"r{i}", 4, seed=i) for i in range(100)}
    with connect(gateway.address, client_id="trainer", timeout=20) as client:
        client.submit(asked.values())
        seen = []
        for trajectory in client.results():
            seen.append(trajectory.key)
            assert_same(trajectory, make_trajectory(asked[trajectory.request_id], trajectory.sample))
            if len(seen) in (20, 150, 300):
                gateway.kill()
                gateway.start()
        assert sorted(seen) == sorted((name, i) for name in asked for i in range(4))
        delivery, status = client.delivery, client.status()
        assert (delivery["requested"], delivery["unique"], delivery["missing"]) == (400, 400, 0)
        assert (status["requested"], status["unique"], status["missing"]) == (400, 400, 0)


def test_gateway_killed_while_nobody_listens_and_while_submitting(served: Callable[..., Served]) -> None:
    gateway = served(1e9)
    asked = [request(f"r{i:04}", prompt=range(1, 60)) for i in range(1000)]
    with connect(gateway.address, client_id="trainer", timeout=20) as client:
        killer = threading.Thread(target=lambda: (time.sleep(0.05), gateway.kill(), gateway.start()))
        killer.start()
        found = client.generate(asked)
        killer.join()
        assert [t.request_id for t in found] == [r.id for r in asked]
        gateway.kill()
        gateway.start()
        assert len(client.generate([request("after")])) == 1
        assert client.delivery["missing"] == 0


TRAINER = """
import os, sys
sys.path.insert(0, sys.argv[3])
from bridge_parts import request
from blockroll.trainer_bridge.client import connect
asked = [request(f"r{i}", 3, seed=i) for i in range(60)]
with connect(sys.argv[1], client_id="trainer", timeout=20) as client, open(sys.argv[2], "a") as journal:
    client.submit(asked)
    for t in client.results(on_error="skip"):
        journal.write(f"{t.request_id} {t.sample}\\n")
        journal.flush()
        os.fsync(journal.fileno())
    print("done", client.delivery["missing"], flush=True)
"""


def test_trainer_and_gateway_killed_again_and_again(served: Callable[..., Served], tmp_path: Path) -> None:
    gateway, journal, rng = served(150.0), tmp_path / "journal", random.Random(0)
    journal.touch()
    output = ""
    for turn in range(12):
        before = len(journal.read_text().splitlines())
        with subprocess.Popen([sys.executable, "-c", TRAINER, gateway.address, str(journal), str(HERE)],
                              stdout=subprocess.PIPE, text=True) as trainer:
            if turn < 4:
                deadline = time.monotonic() + 20
                while len(journal.read_text().splitlines()) < before + rng.randint(5, 30):
                    assert time.monotonic() < deadline
                    time.sleep(0.005)
                trainer.send_signal(signal.SIGKILL)
                if turn % 2:
                    gateway.kill()
                    gateway.start()
            output = trainer.communicate(timeout=60)[0]
        if "done" in output:
            break
    assert output.split() == ["done", "0"]
    # What a killed trainer had written down and not yet acknowledged comes again, and nothing else does.
    lines = journal.read_text().splitlines()
    assert set(lines) == {f"r{i} {s}" for i in range(60) for s in range(3)}
    with connect(gateway.address, client_id="trainer") as client:
        status = client.status()
        assert (status["requested"], status["unique"], status["missing"], status["acknowledged"]) == (180, 180, 0, 180)


class Cable:
    """A TCP proxy whose connections can be cut."""

    def __init__(self, target: str) -> None:
        self._target = ("127.0.0.1", int(target.rpartition(":")[2]))
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self.cut_after: int | None = None
        self.swallow = False
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._server.accept()[0]
                far = socket.create_connection(self._target)
                threading.Thread(target=self._carry, args=(near, far), daemon=True).start()

    def _carry(self, near: socket.socket, far: socket.socket) -> None:
        carried, deaf = 0, False
        self._pairs.append((near, far))
        with contextlib.suppress(OSError), near, far:
            while True:
                for source in select.select([near, far], [], [])[0]:
                    data = source.recv(65536)
                    carried, deaf = carried + len(data), deaf or self.swallow
                    if not data:
                        return
                    if deaf:
                        continue
                    if self.cut_after is not None and carried > self.cut_after:
                        self.cuts += 1
                        (far if source is near else near).send(data[:len(data) // 2])
                        return
                    (far if source is near else near).sendall(data)

    def close(self) -> None:
        self._server.close()
        for pair in self._pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def cable(serve: Callable[..., Gateway]) -> Iterator[Callable[..., Cable]]:
    with contextlib.ExitStack() as stack:
        def lay(backend: ToyBackend) -> Cable:
            made = Cable(serve(backend).address)
            stack.callback(made.close)
            return made

        yield lay


def test_line_cut_in_mid_message(cable: Callable[..., Cable]) -> None:
    line = cable(ToyBackend(rate=2000.0))
    asked = [request(f"r{i:03}", 4, max_tokens=300, prompt=range(1, 60)) for i in range(100)]
    with connect(line.address, client_id="trainer", timeout=20) as client:
        line.cut_after = 700_000
        found = client.generate(asked)
        assert [t.key for t in found] == [(r.id, i) for r in asked for i in range(4)]
        assert client.delivery["missing"] == 0
    assert line.cuts >= 2


def test_line_that_swallows_everything_is_left_for_another(
        cable: Callable[..., Cable], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockroll.trainer_bridge.client.connection.SILENCE_S", 1.0)
    monkeypatch.setattr("blockroll.trainer_bridge.client.connection.PING_S", 0.2)
    line = cable(ToyBackend(rate=100.0))
    with connect(line.address, client_id="trainer", timeout=20) as client:
        client.submit([request(f"r{i}") for i in range(60)])
        stream = client.results()
        seen = [next(stream).key]
        line.swallow = True
        timer = threading.Timer(1.5, lambda: setattr(line, "swallow", False))
        timer.start()
        seen += [t.key for t in stream]
        timer.join()
        assert sorted(seen) == sorted((f"r{i}", 0) for i in range(60))
        assert client.delivery["missing"] == 0


def test_line_cut_in_mid_push(cable: Callable[..., Cable]) -> None:
    backend = ToyBackend(expected={"w": ("float32", (1000, 1000))})
    line = cable(backend)
    tensors = {"w": np.arange(1_000_000, dtype=np.float32).reshape(1000, 1000)}
    with connect(line.address, timeout=20) as client:
        line.cut_after = 2_000_000
        timer = threading.Timer(1.0, lambda: setattr(line, "cut_after", None))
        timer.start()
        assert client.push_weights(1, tensors) == 1
        timer.join()
    assert line.cuts >= 1
    assert np.array_equal(backend.arrays["w"], tensors["w"])


def test_gateway_killed_in_mid_push(served: Callable[..., Served], monkeypatch: pytest.MonkeyPatch) -> None:
    from bridge_parts import weights

    gateway = served(1e9)
    with connect(gateway.address, client_id="trainer", timeout=20) as client:
        killed = threading.Event()

        def killing(self: HostWeights, **options: Any) -> Iterator[tuple[int, int, memoryview]]:
            """Kills the gateway while the tensors are being sent for the first time."""
            for chunk in chunks(self, **options):
                if chunk[0] == 2 and not killed.is_set():
                    gateway.kill()
                    gateway.start()
                    killed.set()
                yield chunk

        chunks = HostWeights.chunks
        monkeypatch.setattr(HostWeights, "chunks", killing)
        assert client.push_weights(1, weights()) == 1
        assert killed.is_set()
        assert client.generate([request("a")])[0].versions[0] == 1


def test_stopped_gateway_is_waited_for(served: Callable[..., Served]) -> None:
    gateway = served(1e9)
    with connect(gateway.address, client_id="trainer", timeout=20) as client:
        os.kill(gateway.process.pid, signal.SIGSTOP)
        timer = threading.Timer(1.2, lambda: os.kill(gateway.process.pid, signal.SIGCONT))
        timer.start()
        assert len(client.generate([request("a", 2)])) == 2
        timer.join()
