"""Cancellation: unfinished samples end, the request fails with its reason, the counts add up."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from bridge_parts import Served, ToyBackend, record, request, until, weights

from blockroll.trainer_bridge.client import RequestRefused, connect
from blockroll.trainer_bridge.gateway import Gateway
from blockroll.trainer_bridge.gateway.ledger import Ledger

Serve = Callable[..., Gateway]
WHY = "cancelled by its client"


def test_a_cancelled_request_ends_in_the_backend_and_the_counts_add_up(serve: Serve) -> None:
    backend = ToyBackend(rate=0.0)
    with connect(serve(backend).address, client_id="t") as client:
        client.submit([request("long", 5000), request("short", 2)])
        until(lambda: len(backend._work) == 5002)
        client.cancel(["long", "unknown"])
        until(lambda: len(backend._work) == 2)
        backend.rate = 1e9
        assert sorted(t.key for t in client.results(timeout=10)) == [("short", 0), ("short", 1)]
        assert client.delivery == {"requested": 5002, "unique": 2, "duplicates": 0, "failed": 5000, "missing": 0}
        client.cancel(["long", "short"])
        status = client.status()
        assert (status["requested"], status["unique"], status["failed"], status["missing"]) == (5002, 2, 5000, 0)
        assert status["in_flight"] == 0


def test_a_gateway_that_ends_leaves_none_of_its_work_in_the_backend(serve: Serve) -> None:
    """Neither what its client cancels in its last moment, nor what is unfinished: the next gateway serves that anew."""
    backend = ToyBackend(rate=0.0)
    gateway = serve(backend)
    with connect(gateway.address, client_id="t") as client:
        client.submit([request("cancelled", 50), request("unfinished", 2)])
        until(lambda: len(backend._work) == 52)
        client.cancel(["cancelled"])
        gateway.stop()
    assert not backend._work
    backend.rate = 1e9
    with connect(serve(backend).address, client_id="t") as client:
        assert [t.key for t in client.generate([request("unfinished", 2)], timeout=10)] == [("unfinished", 0), ("unfinished", 1)]


def test_generate_names_the_cancelled_request_and_the_samples_it_had_are_delivered(serve: Serve) -> None:
    backend = ToyBackend(rate=50.0)
    gateway = serve(backend)
    with connect(gateway.address, client_id="t") as client:
        client.submit([request("a", 500), request("b", 2)])
        until(lambda: gateway._ledger.counters.unique >= 5)
        client.cancel(["a"])
        backend.rate = 1e9
        with pytest.raises(RequestRefused, match=WHY) as caught:
            client.generate([request("a", 500), request("b", 2)], timeout=10)
        assert caught.value.request_id == "a"
        found = list(client.results(timeout=10))
        assert len(found) == client.delivery["unique"] == gateway._ledger.counters.unique
        assert client.delivery["missing"] == 0 and client.delivery["failed"] + len(found) == 502
    with connect(gateway.address, client_id="t") as client:
        with pytest.raises(RequestRefused, match=WHY):
            client.generate([request("a", 500)])


def test_queued_work_is_cancelled_before_it_is_leased(serve: Serve) -> None:
    backend = ToyBackend(rate=0.0)
    with connect(serve(backend, max_in_flight=4).address) as client:
        client.submit([request("first", 4)])
        client.submit([request("waits", 4), request("stays", 4)])
        until(lambda: len(backend.batches) == 1)
        client.cancel(["waits"])
        backend.rate = 1e9
        assert {t.request_id for t in client.results(timeout=10)} == {"first", "stays"}
        assert [names for _, names in backend.batches] == [["first"], ["stays"]]


def test_a_cancelled_sample_does_not_hold_up_a_push(serve: Serve) -> None:
    backend = ToyBackend(rate=0.0)
    with connect(serve(backend).address) as client, connect(client.address) as pusher:
        client.submit([request("a", 100)])
        until(lambda: len(backend._work) == 100)
        thread = threading.Thread(target=lambda: pusher.push_weights(1, weights(1)))
        thread.start()
        thread.join(0.5)
        assert thread.is_alive() and backend.version == 0
        client.cancel(["a"])
        thread.join(10)
        assert not thread.is_alive() and backend.version == 1


def test_another_client_cannot_cancel(serve: Serve) -> None:
    backend = ToyBackend(rate=0.0)
    gateway = serve(backend)
    with connect(gateway.address, client_id="t") as mine, connect(gateway.address, client_id="u") as other:
        mine.submit([request("a", 3)])
        other.cancel(["a"])
        backend.rate = 1e9
        assert len(list(mine.results(timeout=10))) == 3


def test_a_cancellation_outlives_the_gateway(served: Callable[..., Served]) -> None:
    gateway = served(1e-9)
    with connect(gateway.address, client_id="t", timeout=20) as client:
        client.submit([request("a", 3), request("b", 2)])
        os.kill(gateway.process.pid, signal.SIGSTOP)
        thread = threading.Thread(target=client.cancel, args=(["a"],))
        thread.start()
        gateway.kill()
        gateway.start(1e9)
        thread.join(20)
        assert not thread.is_alive()
        assert {t.request_id for t in client.results(timeout=10)} <= {"a", "b"}
        assert client.delivery["missing"] == 0 == client.status()["missing"]


def test_a_request_of_an_unfinished_batch_is_cancelled(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    record(ledger, request("a", 2), request("b"), final=False)
    assert ledger.cancel("t", ["a"], "no") == []
    record(ledger, request("c"), part=1)
    leased = ledger.lease(100)
    assert leased is not None and [r.id for r in leased[1]] == ["b", "c"]
    assert (ledger.counters.requested, ledger.counters.failed, ledger.counters.missing) == (4, 2, 2)
    ledger.close()
