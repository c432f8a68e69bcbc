"""RolloutClient: each trajectory once, in order where asked, acknowledged when the caller came back."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from bridge_parts import ToyBackend, assert_same, make_trajectory, request, weights

from blockroll.errors import InvalidInput, RequestError, TransportError
from blockroll.trainer_bridge.client import RequestRefused, connect
from blockroll.trainer_bridge.gateway import Gateway

Serve = Callable[..., Gateway]


def test_client_imports_no_torch_ray_or_engine() -> None:
    code = """
import sys, blockroll
from blockroll import RolloutRequest, connect
heavy = {"torch", "ray", "transformers", "triton", "sqlite3", "cloudpickle", "asyncio"}
ours = {m for m in sys.modules if m.startswith("blockroll")}
bad = heavy & {m.partition(".")[0] for m in sys.modules}
allowed = {"errors", "seeds", "rollout", "rollout.types", "rollout.params", "rollout.stop_strings", "rollout.backend"}
allowed |= {"trainer_bridge", "files", "inputs", "storage", "model", "model.arguments"}
bridge = ("blockroll.trainer_bridge.client", "blockroll.trainer_bridge.wire")
ours = {m for m in ours if not m.startswith(bridge)}
assert not bad, bad
assert ours <= {"blockroll"} | {"blockroll." + m for m in allowed}, ours
assert "blockroll.trainer_bridge.wire.gateway_socket" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_generate_orders_by_id_whatever_the_arrival(serve: Serve) -> None:
    asked = [request(f"r{i}", 5, seed=i) for i in range(30)]
    with connect(serve(ToyBackend()).address) as client:
        found = client.generate(asked)
        assert [t.key for t in found] == sorted((r.id, i) for r in asked for i in range(5))
        by_id = {r.id: r for r in asked}
        for t in found:
            assert_same(t, make_trajectory(by_id[t.request_id], t.sample))
        assert client.delivery == {"requested": 150, "unique": 150, "duplicates": 0, "failed": 0, "missing": 0}
        assert client.generate([]) == []


def test_results_yields_each_once_and_acknowledges_the_one_before(serve: Serve) -> None:
    gateway = serve(ToyBackend())
    with connect(gateway.address) as client:
        client.submit([request("a", 3)])
        client.submit([request("b", 2), request("a", 3)])
        stream, keys = client.results(timeout=10), []
        for turn in range(5):
            keys.append(next(stream).key)
            assert client.status()["acknowledged"] == turn
        assert next(stream, None) is None
        assert sorted(keys) == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)]
        assert list(client.results()) == []
        assert client.status()["acknowledged"] == 5


def test_what_was_not_acknowledged_comes_to_the_next_life(serve: Serve) -> None:
    gateway = serve(ToyBackend())
    asked = [request("a", 2), request("b")]

    class Crash(Exception):
        pass

    with pytest.raises(Crash), connect(gateway.address, client_id="t") as client:
        client.generate(asked)
        raise Crash
    with connect(gateway.address, client_id="t") as client:
        assert len(client.generate(asked)) == 3
    with connect(gateway.address, client_id="t") as client:
        with pytest.raises(RequestRefused, match="acknowledged in an earlier life"):
            client.generate(asked)
    with connect(gateway.address, client_id="t") as client:
        assert client.generate([*asked, request("c")], on_error="skip")[0].key == ("c", 0)
        assert client.delivery["missing"] == 0
        assert client.status()["duplicates"] == 0


def test_half_acknowledged_group_is_not_passed_off_as_whole(serve: Serve) -> None:
    gateway = serve(ToyBackend())
    with connect(gateway.address, client_id="t") as client:
        client.submit([request("a", 3)])
        next(client.results())
    with connect(gateway.address, client_id="t") as client:
        with pytest.raises(RequestRefused, match="1 samples were acknowledged"):
            client.generate([request("a", 3)])
        assert len(list(client.results())) == 2
        assert client.delivery["missing"] == 0


def test_manual_acknowledgement(serve: Serve) -> None:
    gateway = serve(ToyBackend())
    with connect(gateway.address, client_id="t", ack="manual") as client:
        first = client.generate([request("a", 4)])
        client.generate([request("b")])
        assert client.status()["acknowledged"] == 0
        client.acknowledge(first[:3])
        assert client.status()["acknowledged"] == 3
    with connect(gateway.address, client_id="t") as client:
        client.submit([request("b")])
        assert {t.key for t in client.results()} >= {("b", 0)}


def test_a_refusal_is_acknowledged_like_a_trajectory(serve: Serve) -> None:
    gateway = serve(ToyBackend())
    asked = [request("a"), request("long", 3, prompt=range(1, 100)), request("longer", prompt=range(1, 100))]
    with connect(gateway.address, client_id="t", ack="manual") as client:
        with pytest.raises(RequestRefused) as caught:
            client.generate(asked)
        assert [e.request_id for e in (caught.value, *caught.value.others)] == ["long", "longer"]
    with connect(gateway.address, client_id="t", ack="manual") as client:
        with pytest.raises(RequestRefused) as caught:
            client.generate(asked)
        client.acknowledge([caught.value, *client.results()])
    with connect(gateway.address, client_id="t", ack="manual") as client:
        client.submit([request("b")])
        assert [t.key for t in client.results()] == [("b", 0)]


@pytest.mark.parametrize("call", ["generate", "results"])
def test_a_refusal_that_is_skipped_does_not_come_back(serve: Serve, call: str) -> None:
    gateway = serve(ToyBackend())
    asked = [request("a"), request("long", prompt=range(1, 100))]
    with connect(gateway.address, client_id="t", ack="manual") as client:
        if call == "generate":
            found = client.generate(asked, on_error="skip")
        else:
            client.submit(asked)
            found = list(client.results(on_error="skip"))
        client.acknowledge(found)
    with connect(gateway.address, client_id="t", ack="manual") as client:
        client.submit([request("b")])
        assert [t.key for t in client.results()] == [("b", 0)]


def test_a_trainer_that_resumes_acknowledges_what_its_checkpoint_holds(serve: Serve) -> None:
    """Killed after its checkpoint and before, or in the middle of, the acknowledgement of the step it holds."""
    gateway = serve(ToyBackend())
    steps = [[request(f"step-{s}/{i}", 4, seed=s) for i in range(40)] for s in range(3)]
    with connect(gateway.address, client_id="t", ack="manual") as client:
        for step in steps[:2]:
            found = client.generate(step)
        client.acknowledge(found[:37])
        client.submit(steps[2])
    with connect(gateway.address, client_id="t", ack="manual") as client:
        client.acknowledge(r for step in steps[:2] for r in step)
        assert client.status()["acknowledged"] == 2 * 160
        again = client.generate(steps[2])
        assert [t.key for t in again] == [(r.id, i) for r in sorted(steps[2], key=lambda r: r.id) for i in range(4)]
        client.acknowledge(again)
        assert client.delivery == {"requested": 160, "unique": 160, "duplicates": 0, "failed": 0, "missing": 0}
        assert list(client.results()) == []
        assert client.status()["acknowledged"] == 3 * 160
    with connect(gateway.address, client_id="t", ack="manual") as client:
        with pytest.raises(RequestRefused, match="all of it was acknowledged in an earlier life"):
            client.generate(steps[2])


def test_a_request_acknowledged_before_all_of_it_came_goes_on(serve: Serve) -> None:
    backend = ToyBackend(rate=0.0)
    with connect(serve(backend).address, client_id="t", ack="manual") as client:
        client.submit([request("a", 3)])
        client.acknowledge([request("a", 3), request("unknown", 2)])
        backend.rate = 1e9
        assert len(client.generate([request("a", 3)], timeout=10)) == 3


def test_a_batch_is_collected_after_long_work_elsewhere(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Submitted, left alone for longer than a silence is borne, then collected by the same requests."""
    monkeypatch.setattr("blockroll.trainer_bridge.client.connection.SILENCE_S", 1.0)
    with connect(serve(ToyBackend(rate=200)).address, timeout=2.0) as client:
        mine = [request(f"next-{i}", 2) for i in range(20)]
        client.submit(mine)
        time.sleep(2.5)
        assert client.push_weights(1, weights(1)) == 1
        assert {t.request_id for t in client.generate([request("other")])} == {"other"}
        assert [t.key for t in client.generate(mine)] == sorted((r.id, i) for r in mine for i in range(2))
        assert client.delivery["missing"] == client.delivery["duplicates"] == 0


def test_refused_request_is_named_and_the_others_go_on(serve: Serve) -> None:
    with connect(serve(ToyBackend()).address) as client:
        asked = [request("a", 2), request("long", 3, prompt=range(1, 100)), request("b")]
        with pytest.raises(RequestRefused, match="99 tokens are more than 64") as caught:
            client.generate(asked)
        assert caught.value.request_id == "long"
        assert sorted(t.key for t in client.results()) == [("a", 0), ("a", 1), ("b", 0)]
        assert client.delivery == {"requested": 6, "unique": 3, "duplicates": 0, "failed": 3, "missing": 0}
        with pytest.raises(RequestError, match="already"):
            client.generate(asked)
        fresh = [request("c"), request("long2", prompt=range(1, 100))]
        assert [t.key for t in client.generate(fresh, on_error="skip")] == [("c", 0)]
        client.submit([request("long3", prompt=range(1, 100)), request("d")])
        keys = []
        for _ in range(2):
            try:
                for trajectory in client.results():
                    keys.append(trajectory.key)
            except RequestRefused as error:
                assert error.request_id == "long3"
        assert keys == [("d", 0)]


def test_ids_name_one_content_for_ever(serve: Serve) -> None:
    gateway = serve(ToyBackend())
    with connect(gateway.address, client_id="t") as client:
        client.submit([request("a")])
        with pytest.raises(RequestError, match="'a' was already used with other content"):
            client.submit([request("a", seed=8)])
        with pytest.raises(RequestError, match="share an id"):
            client.generate([request("x"), request("x")])
        assert len(list(client.results())) == 1
    with connect(gateway.address, client_id="u") as client:
        with pytest.raises(RequestRefused, match="'a' belongs to another client"):
            client.generate([request("a"), request("z")])
    with connect(gateway.address, client_id="t") as client:
        with pytest.raises(RequestRefused, match="'a' was already used with other content"):
            client.generate([request("a", seed=8)])


def test_results_and_generate_mix(serve: Serve) -> None:
    with connect(serve(ToyBackend(rate=300)).address) as client:
        client.submit([request(f"s{i}") for i in range(20)])
        assert [t.request_id for t in client.generate([request("g", 2)])] == ["g", "g"]
        first = next(client.results())
        assert len(list(client.results())) == 19
        assert first.request_id.startswith("s")
        client.submit([request("late", 2)])
        next(client.results())
        with pytest.raises(RequestError, match="in part"):
            client.generate([request("late", 2)])


def test_timeout_says_what_is_missing_and_generate_can_be_repeated(serve: Serve) -> None:
    backend = ToyBackend(rate=0.0)
    with connect(serve(backend).address) as client:
        for ask in (lambda: client.generate([request("a")], timeout=0.3), lambda: list(client.results(timeout=0.3))):
            with pytest.raises(TransportError, match="1 samples are outstanding"):
                ask()
        backend.rate = 1e9
        assert [t.key for t in client.generate([request("a")], timeout=10)] == [("a", 0)]
        assert client.delivery["requested"] == 1


@pytest.mark.parametrize("bad", [{"ack": "later"}, {"client_id": "x" * 101}, {"client_id": "a\nb"}])
def test_bad_options(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        connect("tcp://127.0.0.1:1", **bad)


def test_a_client_nobody_closed_does_not_hang_the_exit(serve: Serve) -> None:
    code = """
import gc, sys
from blockroll import connect
holder = {"client": connect(sys.argv[1])}
holder["self"] = holder
del holder
gc.collect()
kept = connect(sys.argv[1])
"""
    address = serve(ToyBackend()).address
    subprocess.run([sys.executable, "-c", code, address], check=True, timeout=20)


def test_closed_client_says_so(serve: Serve) -> None:
    client = connect(serve(ToyBackend()).address)
    client.close()
    client.close()
    with pytest.raises(TransportError, match="closed"):
        client.submit([request("a")])
    with pytest.raises(TransportError, match="closed"):
        client.status()
