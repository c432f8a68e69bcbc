"""The gateway: whole batches, checked and atomic weight pushes, trouble told and outlived."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bridge_parts import ToyBackend, request, weights

from blockroll.errors import ClusterError, InvalidInput, StorageError, TransportError
from blockroll.rollout.backend import Completed
from blockroll.trainer_bridge import messages, sessions
from blockroll.trainer_bridge.client import connect
from blockroll.trainer_bridge.connection import Connection
from blockroll.trainer_bridge.control import ControlPlane
from blockroll.trainer_bridge.gateway import Gateway
from blockroll.trainer_bridge.messages import Shutdown, Stopping
from blockroll.trainer_bridge.weights import make_manifest

Serve = Callable[..., Gateway]


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def test_a_batch_reaches_the_cluster_whole_and_in_order(serve: Serve) -> None:
    backend = ToyBackend()
    with connect(serve(backend, max_in_flight=50).address) as client:
        names = [f"r{i * 7919 % 500}" for i in range(500)]
        client.generate([request(n) for n in names])
        client.generate([request("x"), request("y")])
    assert backend.batches == [(1, names), (2, ["x", "y"])]


def test_leased_work_is_bounded(serve: Serve) -> None:
    backend = ToyBackend(rate=0.0)
    with connect(serve(backend, max_in_flight=10).address) as client:
        for i in range(8):
            client.submit([request(f"r{i}", 4)])
        until(lambda: len(backend.batches) == 2)
        assert client.status()["in_flight"] == 8
        backend.rate = 1e9
        assert len(list(client.results())) == 32


def test_backend_that_repeats_itself(serve: Serve) -> None:
    with connect(serve(ToyBackend(repeat=True)).address) as client:
        assert len(client.generate([request("a", 10), request("b", 10)])) == 20
        status = client.status()
        assert (status["requested"], status["unique"], status["duplicates"], status["missing"]) == (20, 20, 20, 0)
        assert client.delivery["duplicates"] == 0


def test_lost_lease_is_given_again_and_its_late_output_refused(serve: Serve) -> None:
    class Forgetful(ToyBackend):
        """Sits on its first lease until the second has come."""

        def poll(self, timeout: float) -> list[Completed]:
            return [] if len(self.batches) < 2 else super().poll(timeout)

    backend = Forgetful()
    with connect(serve(backend, lease_seconds=0.3).address) as client:
        assert len(client.generate([request("a", 3)])) == 3
        until(lambda: int(client.status()["stale"]) >= 3)
        assert client.status()["unique"] == 3
    epochs = [epoch for epoch, _ in backend.batches]
    assert epochs == list(range(1, len(epochs) + 1))


def test_cluster_without_engines_is_a_notice_and_outlived(serve: Serve) -> None:
    backend = ToyBackend()
    backend.broken = "no live actor"
    with connect(serve(backend).address) as client:
        with pytest.raises(TransportError, match="no live actor"):
            client.generate([request("a")], timeout=1.5)
        assert "no live actor" in str(client.status()["notice"])
        backend.broken = ""
        assert len(client.generate([request("a")], timeout=10)) == 1
        assert client.status()["notice"] == ""


def test_bug_of_the_backend_ends_the_gateway_and_is_raised(tmp_path: Path) -> None:
    class Buggy(ToyBackend):
        def poll(self, timeout: float) -> list[Completed]:
            if self.batches:
                raise KeyError("bug")
            return []

    gateway = Gateway(Buggy(), "tcp://127.0.0.1:*", tmp_path / "l").start()
    with connect(gateway.address) as client, pytest.raises(ClusterError, match="KeyError"):
        client.generate([request("a")])
    with pytest.raises(KeyError):
        gateway.stop()


def test_client_that_was_busy_elsewhere_hears_why_the_gateway_ended(tmp_path: Path) -> None:
    class Buggy(ToyBackend):
        def poll(self, timeout: float) -> list[Completed]:
            raise KeyError("bug")

    backend = ToyBackend()
    gateway = Gateway(backend, "tcp://127.0.0.1:*", tmp_path / "l").start()
    with connect(gateway.address) as client:
        client.generate([request("a")])
        backend.__class__ = Buggy
        with pytest.raises(KeyError):
            gateway.wait(20)
        with pytest.raises(ClusterError, match="KeyError"):
            client.submit([request("b")])


def test_full_disk_is_an_error_for_who_submits_and_a_wait_for_who_waits(serve: Serve) -> None:
    gateway = serve(ToyBackend(rate=0.0), max_ledger_bytes=400_000)
    backend: Any = gateway._cluster
    with connect(gateway.address) as client:
        with pytest.raises(StorageError, match="free disk space"):
            for i in range(100):
                client.submit([request(f"r{i}", prompt=range(1, 5000))])
        assert client.status()["missing"] == client.delivery["missing"] > 0
        backend.longest, backend.rate = 10**6, 1e9
        until(lambda: client.status()["in_flight"] == 0)
        gateway._ledger._file.run("PRAGMA max_page_count=1000000")
        client.submit([request("more", prompt=range(1, 5000))])
        assert len(list(client.results(timeout=10))) == client.delivery["requested"]
        assert client.delivery["missing"] == 0
        assert client.status()["notice"] == ""


def test_disk_that_stays_full_ends_a_gateway_of_little_patience(tmp_path: Path) -> None:
    backend = ToyBackend()
    gateway = Gateway(backend, "tcp://127.0.0.1:*", tmp_path / "l", max_ledger_bytes=250_000, disk_patience=0.5).start()
    with connect(gateway.address) as client:
        with pytest.raises(StorageError, match="free disk space"):
            client.generate([request(f"r{i}", 8) for i in range(200)])
    with pytest.raises(StorageError, match="free disk space"):
        gateway.wait(10)


def test_trouble_with_an_acknowledgement_ends_with_its_session(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client whose acknowledgement met a full disk goes for good; then there is room again."""
    monkeypatch.setattr(sessions, "PROBE_S", 0.1)
    gateway = serve(ToyBackend(), disk_patience=2.0)
    gone = connect(gateway.address, ack="manual")
    found = gone.generate([request("a")])
    gateway._ledger._file.run("PRAGMA query_only=1")
    gone._deliveries.acknowledge([t.key for t in found])
    gone._deliveries.drive(lambda: gateway._sessions.trouble is not None)
    gone.close(acknowledge=False)
    until(lambda: len(gateway._sessions) == 0)
    gateway._ledger._file.run("PRAGMA query_only=0")
    assert not gateway.wait(2.5)
    with connect(gateway.address) as client:
        assert client.status()["notice"] == ""


def test_a_start_that_fails_lets_go_of_the_ledger(tmp_path: Path) -> None:
    class Dead(ToyBackend):
        def stats(self) -> dict[str, float | int | str]:
            raise ClusterError("no live actor")

    path = tmp_path / "l"
    for backend, address, error in ((Dead(), "tcp://127.0.0.1:*", ClusterError), (ToyBackend(), "tcp://1:1", TransportError)):
        gateway = Gateway(backend, address, path)
        with pytest.raises(error):
            gateway.start()
        with Gateway(ToyBackend(), "tcp://127.0.0.1:*", path):
            pass


def test_the_size_of_the_ledger_is_shown(serve: Serve) -> None:
    with connect(serve(ToyBackend(), keep_requests=3).address) as client:
        client.generate([request(f"r{i}") for i in range(10)])
        client.generate([request("last")])
        status = client.status()
        assert status["ledger_kept"] == 3
        assert 0 <= int(status["ledger_free_bytes"]) < int(status["ledger_bytes"])


def test_push_serves_the_new_weights_bit_for_bit(serve: Serve) -> None:
    backend = ToyBackend()
    with connect(serve(backend).address) as client:
        assert client.generate([request("a")])[0].versions[0] == 0
        assert client.push_weights(1, weights(1)) == client.version == 1
        assert {k: v.tobytes() for k, v in backend.arrays.items()} == {k: v.tobytes() for k, v in weights(1).items()}
        assert client.generate([request("b")])[0].versions[0] == 1


def test_push_larger_than_every_window(serve: Serve) -> None:
    backend = ToyBackend(expected={"big": ("float32", (3000, 3000)), "b": ("float32", (5,))})
    tensors = {"big": np.arange(9_000_000, dtype=np.float32).reshape(3000, 3000), "b": np.ones(5, np.float32)}
    with connect(serve(backend).address) as client:
        client.push_weights(1, tensors)
    assert all(np.array_equal(backend.arrays[k], v) for k, v in tensors.items())


def test_versions_follow_each_other_and_repeats_change_nothing(serve: Serve) -> None:
    backend = ToyBackend()
    with connect(serve(backend).address) as client:
        for bad in (0, -1, True, 1.0):
            with pytest.raises(InvalidInput, match="version"):
                client.push_weights(bad, weights())  # type: ignore[arg-type]
        with pytest.raises(TransportError, match="follows 1, but 0 serves"):
            client.push_weights(2, weights(2))
        client.push_weights(1, weights(1))
        backend.arrays = {}
        assert client.push_weights(1, weights(1)) == 1
        assert backend.arrays == {}
        with pytest.raises(TransportError, match="other content"):
            client.push_weights(1, weights(2))
        assert client.push_weights(5, weights(5), allow_gap=True) == 5
        assert client.push_weights(1, weights(1)) == 5
        assert client.push_weights(6, weights(6)) == 6
        with pytest.raises(TransportError, match="does not offer 'keep'.*finish"):
            client.push_weights(7, weights(7), in_flight="keep")
        assert backend.version == 6


def test_what_does_not_fit_leaves_the_old_version(serve: Serve) -> None:
    backend = ToyBackend()
    with connect(serve(backend).address) as client:
        for tensors in ({}, {"scale": np.float32(1)}, {**weights(), "extra": np.zeros(1)},
                        {**weights(), "scale": np.float64(1)}):
            with pytest.raises((TransportError, InvalidInput)):
                client.push_weights(1, tensors)
        backend.broken = "engine 1 is dead"
        with pytest.raises(ClusterError, match="engine 1 is dead"):
            client.push_weights(1, weights())
        assert client.status()["version"] == 0
        backend.broken = ""
        assert client.push_weights(1, weights()) == 1


@pytest.mark.parametrize(("name", "value"), [("embed.weight", np.nan), ("scale", np.inf), ("half", -np.inf)])
def test_weights_that_are_not_finite_leave_the_old_version(serve: Serve, name: str, value: float) -> None:
    backend = ToyBackend()
    with connect(serve(backend).address) as client:
        client.push_weights(1, weights(1))
        bad = {k: np.array(v) for k, v in weights(2).items()}
        bad[name][(0,) * bad[name].ndim] = value
        with pytest.raises(TransportError, match=f"{name!r} is not finite"):
            client.push_weights(2, bad)
        assert client.status()["version"] == backend.version == 1
        assert client.generate([request("a")])[0].versions[0] == 1
        assert client.push_weights(2, weights(2)) == 2


def test_a_state_dict_with_its_tied_head_is_welcome(serve: Serve) -> None:
    torch = pytest.importorskip("torch")
    expected = {"model.embed_tokens.weight": ("bfloat16", (600, 1000)), "model.norm.weight": ("float32", (8,)),
                "z.weight": ("float32", (900, 1000))}
    embedding = torch.nn.Parameter(torch.randn(600, 1000).bfloat16())
    others = {"model.norm.weight": torch.ones(8), "z.weight": torch.randn(900, 1000)}
    state = {"lm_head.weight": embedding, "model.embed_tokens.weight": embedding, **others}
    backend = ToyBackend(expected=expected)
    with connect(serve(backend).address) as client:
        for version, order in enumerate((list(state), list(state)[::-1], sorted(state)), start=1):
            assert client.push_weights(version, {name: state[name] for name in order}) == version
            assert {k: v.shape for k, v in backend.arrays.items()} == {k: shape for k, (_, shape) in expected.items()}
            assert np.array_equal(backend.arrays["z.weight"], others["z.weight"].numpy())
            assert torch.equal(torch.from_numpy(backend.arrays["model.embed_tokens.weight"]).view(torch.bfloat16), embedding)
        del state["lm_head.weight"]
        backend.arrays = {}
        assert client.push_weights(3, {name: state[name] for name in sorted(state)}) == 3
        assert backend.arrays == {}
        for head in (embedding + 1, embedding.float()):
            with pytest.raises(TransportError, match=r"'lm_head.weight' differs from 'model.embed_tokens.weight'.*tied"):
                client.push_weights(4, {**state, "lm_head.weight": head})
        assert client.status()["version"] == 3
        assert client.push_weights(4, {**state, "lm_head.weight": embedding.clone()}) == 4


def test_an_untied_head_is_one_tensor_of_the_policy(serve: Serve) -> None:
    expected = {"model.embed_tokens.weight": ("float32", (6, 4)), "lm_head.weight": ("float32", (6, 4))}
    same = np.ones((6, 4), np.float32)
    backend = ToyBackend(expected=expected)
    with connect(serve(backend).address) as client:
        assert client.push_weights(1, {"model.embed_tokens.weight": same, "lm_head.weight": same}) == 1
        assert list(backend.arrays) == ["model.embed_tokens.weight", "lm_head.weight"]
        with pytest.raises(TransportError, match=r"lacks 1 tensors, 'lm_head.weight'"):
            client.push_weights(2, {"model.embed_tokens.weight": same})


def test_finish_waits_for_what_is_in_flight_and_holds_what_comes_later(serve: Serve) -> None:
    backend = ToyBackend(rate=0.0)
    gateway = serve(backend)
    with connect(gateway.address) as client, connect(gateway.address) as other:
        client.submit([request(f"r{i}") for i in range(20)])
        until(lambda: bool(backend.batches))
        pusher = threading.Thread(target=other.push_weights, args=(1, weights()))
        pusher.start()
        until(lambda: gateway._desk._committing is not None)
        client.submit([request("late")])
        backend.rate = 1e9
        versions = {t.request_id: int(t.versions[0]) for t in client.results()}
        pusher.join(10)
        assert not pusher.is_alive()
        assert versions.pop("late") == 1
        assert set(versions.values()) == {0}
        assert backend.in_flight_at_commit == 0


def test_other_policies_go_to_a_backend_that_offers_them(serve: Serve) -> None:
    class Keeping(ToyBackend):
        in_flight_policies = ("finish", "keep")
        used = ""

        def commit_weights(self, version: int, arrays: Mapping[str, np.ndarray], in_flight: str = "finish") -> None:
            super().commit_weights(version, arrays)
            self.used = in_flight

    backend = Keeping(rate=0.0)
    with connect(serve(backend).address) as client:
        client.submit([request(f"r{i}") for i in range(30)])
        until(lambda: bool(backend.batches))
        client.push_weights(1, weights(), in_flight="keep")
        assert backend.used == "keep"
        assert backend.in_flight_at_commit == 30
        backend.rate = 1e9
        assert {int(t.versions[0]) for t in client.results()} == {1}


def control(address: str, name: str = "p") -> ControlPlane:
    plane = ControlPlane(address, name, None, 5.0)
    plane._open()
    return plane


def begin(plane: ControlPlane, push: str, version: int = 1, seed: int = 1) -> None:
    manifest = make_manifest(version, version - 1, weights(seed))
    plane._connection.send(messages.PushBegin(push, "finish", (manifest.encode(),)))


def test_wrong_bytes_on_the_wire_leave_the_old_version(serve: Serve) -> None:
    backend = ToyBackend()
    gateway = serve(backend)
    plane = control(gateway.address)
    data = weights(1)["embed.weight"].tobytes()
    for chunk in ((0, 0, data[:-1] + b"x"), (0, 4, data), (1, 0, b"1234"), (0, 0, data + b"more")):
        begin(plane, "p")
        plane._state("p")
        plane._connection.send(messages.PushChunk("p", *chunk[:2], (chunk[2],)))
        with pytest.raises(TransportError, match=r"digest|chunk"):
            plane._state("p")
        plane._connection.send(messages.PushCommit("p"))
        with pytest.raises(TransportError, match="not staged"):
            plane._state("p")
    begin(plane, "q")
    plane._connection.send(messages.PushCommit("q"))
    plane._state("q")
    with pytest.raises(TransportError, match="missing or incomplete"):
        plane._state("q")
    plane._connection.send(messages.PushBegin("r", "finish", (b"garbage" * 10,)))
    with pytest.raises(TransportError):
        plane._state("r")
    plane.close()
    assert backend.version == 0
    with connect(gateway.address) as client:
        assert client.push_weights(1, weights(2)) == 1


def test_aborted_and_abandoned_pushes_leave_the_old_version(serve: Serve) -> None:
    backend = ToyBackend()
    gateway = serve(backend, push_idle_seconds=0.5)
    first, second = control(gateway.address), control(gateway.address, "q")
    begin(first, "p")
    first._state("p")
    begin(second, "q")
    with pytest.raises(TransportError, match="by client 'p'"):
        second._state("q")
    first._abort("p")
    until(lambda: gateway._desk._stage is None)
    begin(second, "q")
    second._state("q")
    second.close()
    first.close()
    until(lambda: gateway._desk._stage is None)
    assert backend.version == 0
    with connect(gateway.address) as client:
        assert client.push_weights(1, weights()) == 1


def test_interrupted_sender_aborts(serve: Serve) -> None:
    class Interrupted(dict[str, np.ndarray]):
        reads = 0

        def items(self) -> Any:
            self.reads += 1
            for pair in super().items():
                if self.reads == 2 and pair[0] == "half":
                    raise KeyboardInterrupt
                yield pair

    backend = ToyBackend()
    gateway = serve(backend)
    with connect(gateway.address) as client:
        with pytest.raises(KeyboardInterrupt):
            client.push_weights(1, Interrupted(weights()))
        until(lambda: gateway._desk._stage is None)
        assert backend.version == 0
        assert client.push_weights(1, weights()) == 1


def test_shutdown_over_the_control_plane(serve: Serve) -> None:
    gateway = serve(ToyBackend())
    with connect(gateway.address) as client:
        client.shutdown_gateway()
    assert gateway.wait(10)


def test_a_gateway_stays_until_who_stopped_it_has_heard_so(serve: Serve) -> None:
    gateway = serve(ToyBackend())
    deaf = Connection(gateway.address, "deaf", keys=None, control=True, timeout=10)
    deaf.open()
    deaf.send(Shutdown())
    assert not gateway.wait(0.5)
    assert any(isinstance(m, Stopping) for m in deaf.receive(5))
    deaf.drop()
    assert gateway.wait(2)


def test_a_word_from_before_a_push_does_not_turn_the_version_back(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the gateway said of its version while weights were on their way is read after the push has ended."""
    monkeypatch.setattr(sessions, "PROBE_S", 0.01)
    backend = ToyBackend()
    gateway = serve(backend)
    commit = backend.commit_weights

    def slow(*arguments: Any, **options: Any) -> None:
        time.sleep(0.5)
        monkeypatch.setattr(sessions, "PROBE_S", 60.0)
        commit(*arguments, **options)

    monkeypatch.setattr(backend, "commit_weights", slow)
    with connect(gateway.address) as client:
        assert client.push_weights(1, weights()) == 1
        client.status()
        assert client.version == 1
