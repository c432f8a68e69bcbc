"""Weight pushes: checked and atomic, by one sender at a time; what is wrong leaves the old version serving."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from bridge_parts import ToyBackend, make_manifest, request, until, weights

from blockroll.errors import ClusterError, InvalidInput, TransportError
from blockroll.trainer_bridge.client import connect
from blockroll.trainer_bridge.client.connection import Connection
from blockroll.trainer_bridge.client.host_weights import HostWeights
from blockroll.trainer_bridge.client.weight_pusher import WeightPusher
from blockroll.trainer_bridge.gateway import Gateway, message_router
from blockroll.trainer_bridge.wire import messages

Serve = Callable[..., Gateway]


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
def test_weights_that_are_not_finite_leave_the_old_version(
        serve: Serve, monkeypatch: pytest.MonkeyPatch, name: str, value: float) -> None:
    """Refused before they travel, and by the gateway where they travel all the same."""
    backend = ToyBackend()
    with connect(serve(backend).address) as client:
        client.push_weights(1, weights(1))
        bad = {k: np.array(v) for k, v in weights(2).items()}
        bad[name][(0,) * bad[name].ndim] = value
        with pytest.raises(InvalidInput, match=rf"tensors\['{name}'\]: not finite at \[.*nothing was sent"):
            client.push_weights(2, bad)
        monkeypatch.setattr(HostWeights, "check_finite", lambda self: None)
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


def chunks_of(pushed: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The tensors of which chunks were sent meanwhile, by their index in the manifest."""
    sent: set[int] = set()
    send = Connection.send

    def counting(self: Connection, message: messages.Message) -> None:
        if isinstance(message, messages.PushChunk):
            sent.add(message.index)
        send(self, message)

    with monkeypatch.context() as patch:
        patch.setattr(Connection, "send", counting)
        pushed()
    return sent


def test_only_what_has_changed_travels(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = ToyBackend()
    gateway = serve(backend)
    first = weights(1)
    second = {**first, "scale": np.array(9.5, np.float32)}
    with connect(gateway.address) as client:
        for version, tensors, want in ((1, first, {0, 1, 2}), (2, second, {1}), (3, second, set()), (4, weights(4), {0, 1, 2})):
            sent = chunks_of(lambda version=version, tensors=tensors: client.push_weights(version, tensors), monkeypatch)
            assert sent == want
            assert {name: array.tobytes() for name, array in backend.arrays.items()} == {
                name: array.tobytes() for name, array in tensors.items()}


def test_a_tied_head_does_not_travel(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {"model.embed_tokens.weight": ("float32", (6, 4)), "z.weight": ("float32", (3,))}
    same, other = np.ones((6, 4), np.float32), np.ones(3, np.float32)
    with connect(serve(ToyBackend(expected=expected)).address) as client:
        for version, names in enumerate((["lm_head.weight", "model.embed_tokens.weight"],
                                         ["model.embed_tokens.weight", "lm_head.weight"]), 1):
            tensors = {**{name: same * version for name in names}, "z.weight": other * version}
            sent = chunks_of(lambda version=version, tensors=tensors: client.push_weights(version, tensors), monkeypatch)
            assert sent == {names.index("model.embed_tokens.weight"), 2}


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
        until(lambda: gateway._weights._committing is not None)
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


def control(address: str, name: str = "p") -> WeightPusher:
    pusher = WeightPusher(Connection(address, name, keys=None, control=True, timeout=5.0))
    pusher._open()
    return pusher


def begin(pusher: WeightPusher, push: str, version: int = 1, seed: int = 1) -> None:
    manifest = make_manifest(version, version - 1, weights(seed))
    pusher._connection.send(messages.PushBegin(push, "finish", (manifest.encode(),)))


def test_wrong_bytes_on_the_wire_leave_the_old_version(serve: Serve) -> None:
    backend = ToyBackend()
    gateway = serve(backend)
    pusher = control(gateway.address)
    data = weights(1)["embed.weight"].tobytes()
    for chunk in ((0, 0, data[:-1] + b"x"), (0, 4, data), (1, 0, b"1234"), (0, 0, data + b"more")):
        begin(pusher, "p")
        pusher._news("p")
        pusher._connection.send(messages.PushChunk("p", *chunk[:2], (chunk[2],)))
        with pytest.raises(TransportError, match=r"digest|chunk"):
            pusher._state("p")
        pusher._connection.send(messages.PushCommit("p"))
        with pytest.raises(TransportError, match="not staged"):
            pusher._state("p")
    begin(pusher, "q")
    pusher._connection.send(messages.PushCommit("q"))
    pusher._news("q")
    with pytest.raises(TransportError, match="missing or incomplete"):
        pusher._state("q")
    pusher._connection.send(messages.PushBegin("r", "finish", (b"garbage" * 10,)))
    with pytest.raises(TransportError):
        pusher._state("r")
    pusher._connection.drop()
    assert backend.version == 0
    with connect(gateway.address) as client:
        assert client.push_weights(1, weights(2)) == 1


def test_aborted_and_abandoned_pushes_leave_the_old_version(serve: Serve) -> None:
    backend = ToyBackend()
    gateway = serve(backend, push_idle_seconds=0.5)
    first, second = control(gateway.address), control(gateway.address, "q")
    begin(first, "p")
    first._news("p")
    begin(second, "q")
    with pytest.raises(TransportError, match="by client 'p'"):
        second._state("q")
    first._abort("p")
    until(lambda: gateway._weights._stage is None)
    begin(second, "q")
    second._news("q")
    second._connection.drop()
    first._connection.drop()
    until(lambda: gateway._weights._stage is None)
    assert backend.version == 0
    with connect(gateway.address) as client:
        assert client.push_weights(1, weights()) == 1


def test_interrupted_sender_aborts(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: HostWeights, needed: bytes) -> Iterator[tuple[int, int, memoryview]]:
        yield next(chunks(self))
        raise KeyboardInterrupt

    chunks = HostWeights.chunks
    backend = ToyBackend()
    gateway = serve(backend)
    with connect(gateway.address) as client:
        with monkeypatch.context() as patch:
            patch.setattr(HostWeights, "chunks", interrupted)
            with pytest.raises(KeyboardInterrupt):
                client.push_weights(1, weights())
        until(lambda: gateway._weights._stage is None)
        assert backend.version == 0
        assert client.push_weights(1, weights()) == 1


def test_a_word_from_before_a_push_does_not_turn_the_version_back(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the gateway said of its version while weights were on their way is read after the push has ended."""
    monkeypatch.setattr(message_router, "PROBE_S", 0.01)
    backend = ToyBackend()
    gateway = serve(backend)
    commit = backend.commit_weights

    def slow(*arguments: Any, **options: Any) -> None:
        time.sleep(0.5)
        monkeypatch.setattr(message_router, "PROBE_S", 60.0)
        commit(*arguments, **options)

    monkeypatch.setattr(backend, "commit_weights", slow)
    with connect(gateway.address) as client:
        assert client.push_weights(1, weights()) == 1
        client.status()
        assert client.version == 1
