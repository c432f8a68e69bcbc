"""A service comes back at the weight version it had, or hands out no work until it has it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bridge_parts import Served, ToyBackend, name_weights, request, until, weights

from blockroll.errors import InvalidInput, StorageError, TransportError
from blockroll.trainer_bridge.client import RolloutClient, connect
from blockroll.trainer_bridge.gateway import Gateway

Serve = Callable[..., Gateway]


def serving(client: RolloutClient) -> int:
    """The version that serves; its weights are those that were pushed as it."""
    until(lambda: client.status()["engine.weights"] == name_weights(weights(int(client.status()["version"]))))
    return int(client.status()["version"])


def kept(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if ".weights-" in p.name)


def test_a_killed_service_comes_back_at_its_version_and_goes_on_with_what_was_left(
        served: Callable[..., Served], tmp_path: Path) -> None:
    gateway = served(0.0)
    with connect(gateway.address, client_id="trainer", timeout=20) as client:
        assert client.push_weights(1, weights(1)) == 1
        client.submit([request(f"r{i}") for i in range(20)])
        gateway.kill()
        gateway.start(1e9)
        assert {int(t.versions[0]) for t in client.results(timeout=20)} == {1}
        assert serving(client) == 1
        assert client.push_weights(2, weights(2)) == 2
        assert client.generate([request("after")])[0].versions[0] == 2
        assert kept(tmp_path) == ["ledger.sqlite.weights-2"]
        gateway.kill()
        gateway.start()
        assert serving(client) == 2


@pytest.mark.parametrize(("moment", "then"), [
    ("sealing", 1), ("taken", 1), ("recorded", 2)])
def test_killed_in_the_middle_of_a_push(served: Callable[..., Served], tmp_path: Path, moment: str, then: int) -> None:
    """What serves after the restart, before the trainer is back, and that the trainer goes on from there."""
    gateway = served(1e9)
    with connect(gateway.address, client_id="trainer", timeout=30) as client:
        client.push_weights(1, weights(1))
        gateway.kill()
        gateway.start(die=moment)
        pushed: list[int] = []
        pusher = threading.Thread(target=lambda: pushed.append(client.push_weights(2, weights(2))))
        pusher.start()
        gateway.process.wait(20)
        files = kept(tmp_path)
        assert "ledger.sqlite.weights-2" in files or moment == "sealing"
        gateway.start()
        with connect(gateway.address, client_id="watcher") as watcher:
            seen = [int(watcher.status()["version"])]
            pusher.join(20)
            assert pushed == [2]
            assert seen[0] in (then, 2)
        assert serving(client) == 2
        assert kept(tmp_path) == ["ledger.sqlite.weights-2"]
        assert client.push_weights(3, weights(3)) == 3
        assert client.generate([request("after")])[0].versions[0] == 3


@pytest.mark.parametrize(("moment", "then"), [("sealed", 1), ("recording", 1), ("swept", 2)])
def test_killed_with_its_trainer_in_the_middle_of_a_push(
        served: Callable[..., Served], tmp_path: Path, moment: str, then: int) -> None:
    """Nobody pushes again: the version that was acknowledged serves, or the one that was being committed."""
    gateway = served(1e9)
    with connect(gateway.address, client_id="trainer", timeout=1.0) as client:
        client.push_weights(1, weights(1))
        gateway.kill()
        gateway.start(die=moment)
        with pytest.raises(TransportError, match="not answered"):
            client.push_weights(2, weights(2))
    gateway.process.wait(20)
    gateway.start()
    with connect(gateway.address, client_id="trainer") as client:
        assert serving(client) == then
        assert kept(tmp_path) == [f"ledger.sqlite.weights-{then}"]
        assert client.generate([request("a")])[0].versions[0] == then
        assert client.push_weights(then + 1, weights(then + 1)) == then + 1


def spoil(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[:-5])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "longer":
        data[:8] = (2**40).to_bytes(8, "little")
        path.write_bytes(data)
    else:
        data[-5] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("following", [1, 2])
@pytest.mark.parametrize(("how", "what"), [
    ("missing", "is missing"), ("cut", "cannot be used"), ("empty", "cannot be used"), ("longer", "cannot be used"),
    ("flipped", "'half' do not have the digest")])
def test_without_its_weights_it_holds_its_work_and_says_so(tmp_path: Path, how: str, what: str, following: int) -> None:
    path = tmp_path / "ledger.sqlite"
    with Gateway(ToyBackend(), "tcp://127.0.0.1:*", path) as gateway, connect(gateway.address, client_id="t") as client:
        client.push_weights(1, weights(1))
    spoil(tmp_path / "ledger.sqlite.weights-1", how)
    backend = ToyBackend()
    with Gateway(backend, "tcp://127.0.0.1:*", path) as gateway, connect(gateway.address, client_id="t") as client:
        client.submit([request("a", 3)])
        with pytest.raises(TransportError, match=what) as caught:
            list(client.results(timeout=0.5))
        assert "weight version 1 was committed last" in str(caught.value)
        assert "ledger.sqlite.weights-1" in str(caught.value)
        assert "push version 1 again, or version 2" in str(client.status()["notice"])
        assert client.version == client.status()["version"] == 1
        assert backend.batches == []
        with pytest.raises(TransportError, match="other content; push version 2"):
            client.push_weights(1, weights(7))
        assert client.push_weights(following, weights(following)) == following
        assert {int(t.versions[0]) for t in client.results(timeout=10)} == {following}
        assert client.status()["notice"] == ""
    with Gateway(ToyBackend(), "tcp://127.0.0.1:*", path) as gateway, connect(gateway.address, client_id="t") as client:
        assert serving(client) == following


def test_what_was_done_is_delivered_while_weights_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Gateway(ToyBackend(), "tcp://127.0.0.1:*", path) as gateway:
        client = connect(gateway.address, client_id="t", ack="manual")
        client.push_weights(1, weights(1))
        client.generate([request("a", 2)])
        client.close()
    (tmp_path / "ledger.sqlite.weights-1").unlink()
    with Gateway(ToyBackend(), "tcp://127.0.0.1:*", path) as gateway, connect(gateway.address, client_id="t") as client:
        assert len(client.generate([request("a", 2)])) == 2


def test_bfloat16_weights_come_back_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockroll.trainer_bridge.gateway.kept_versions.PIECE", 1 << 20)
    torch = pytest.importorskip("torch")
    expected = {"w": ("bfloat16", (300, 7000)), "norm": ("float32", (7,))}
    tensors = {"w": torch.randn(300, 7000).bfloat16(), "norm": torch.randn(7)}
    path = tmp_path / "l"
    with Gateway(ToyBackend(expected=expected), "tcp://127.0.0.1:*", path) as gateway, connect(gateway.address) as client:
        client.push_weights(1, tensors)
    backend = ToyBackend(expected=expected)
    with Gateway(backend, "tcp://127.0.0.1:*", path):
        assert backend.version == 1
    assert torch.equal(torch.from_numpy(backend.arrays["w"]).view(torch.bfloat16), tensors["w"])
    assert np.array_equal(backend.arrays["norm"], tensors["norm"].numpy())


def test_a_version_the_disk_does_not_take_is_refused_and_the_old_one_serves(serve: Serve, tmp_path: Path) -> None:
    backend = ToyBackend()
    with connect(serve(backend).address) as client:
        client.push_weights(1, weights(1))
        for name in ("ledger.sqlite.weights-2.part", "ledger.sqlite.weights-2"):
            (tmp_path / name).mkdir()
            with pytest.raises(StorageError, match=r"ledger\.sqlite\.weights-2"):
                client.push_weights(2, weights(2))
            (tmp_path / name).rmdir()
            assert serving(client) == 1
            assert kept(tmp_path) == ["ledger.sqlite.weights-1"]
        assert client.push_weights(2, weights(2)) == 2


def test_no_sample_of_a_version_is_recorded_before_the_version_is(serve: Serve) -> None:
    """The engines have version 1 and the disk does not take the word for it: neither the trainer nor a sample gets ahead."""
    backend = ToyBackend(rate=0.0)
    gateway = serve(backend)
    with connect(gateway.address) as client, connect(gateway.address) as other:
        client.submit([request("before", 5)])
        until(lambda: bool(backend.batches))
        pusher = threading.Thread(target=other.push_weights, args=(1, weights(1)))
        pusher.start()
        until(lambda: gateway._weights._committing is not None)
        client.submit([request("behind", 5)])
        until(lambda: len(backend.batches) + gateway._driver._commands.qsize() > 1 or gateway._driver.in_flight == 10)
        gateway._ledger._file.run("PRAGMA query_only=1")
        backend.rate = 1e9
        until(lambda: backend.version == 1)
        time.sleep(0.5)
        status = client.status()
        assert (status["version"], status["unique"]) == (0, 0)
        assert "readonly" in str(status["notice"])
        assert pusher.is_alive()
        gateway._ledger._file.run("PRAGMA query_only=0")
        pusher.join(10)
        found = {t.request_id: int(t.versions[0]) for t in client.results(timeout=10)}
        assert found == {"before": 0, "behind": 1}
        assert client.status()["notice"] == ""


def test_files_of_pushes_that_came_to_nothing_are_removed(serve: Serve, tmp_path: Path) -> None:
    for name in ("ledger.sqlite.weights-7", "ledger.sqlite.weights-8.part", "other.weights-7"):
        (tmp_path / name).write_bytes(b"left over")
    backend = ToyBackend()
    with connect(serve(backend).address) as client:
        assert kept(tmp_path) == ["other.weights-7"]
        bad = weights(1)
        bad["half"][1, 2] = np.nan
        with pytest.raises(InvalidInput):
            client.push_weights(1, bad)
        backend.broken = "engine 1 is dead"
        with pytest.raises(Exception, match="engine 1 is dead"):
            client.push_weights(1, weights(1))
        assert kept(tmp_path) == ["other.weights-7"]
        backend.broken = ""
        client.push_weights(1, weights(1))
        assert os.path.getsize(tmp_path / "ledger.sqlite.weights-1") < 4096


def test_a_file_is_whole_though_only_a_part_of_its_version_came(served: Callable[..., Served], tmp_path: Path) -> None:
    gateway = served(1e9)
    first = weights(1)
    second = {**first, "scale": np.array(9.5, np.float32)}
    with connect(gateway.address, client_id="trainer", timeout=20) as client:
        client.push_weights(1, first)
        client.push_weights(2, second)
        client.push_weights(3, second)
        assert kept(tmp_path) == ["ledger.sqlite.weights-3"]
        gateway.kill()
        gateway.start()
        until(lambda: client.status()["engine.weights"] == name_weights(second))
        assert client.status()["version"] == 3
        gateway.kill()
        path = tmp_path / kept(tmp_path)[0]
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        gateway.start()
        assert client.push_weights(4, second) == 4  # the engines have nothing of version 3: all of it travels
        assert client.status()["engine.weights"] == name_weights(second)
