"""Work of a client that is gone waits until the client is back; limits of samples."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from bridge_parts import ToyBackend, record, request, until, weights

from blockroll.errors import RequestError
from blockroll.trainer_bridge.client import RequestRefused, connect
from blockroll.trainer_bridge.gateway import Gateway, message_router
from blockroll.trainer_bridge.gateway.ledger import Ledger

Serve = Callable[..., Gateway]


@pytest.fixture(autouse=True)
def _probe_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_router, "PROBE_S", 0.1)


def test_work_of_a_client_that_is_gone_waits_and_goes_on_when_it_is_back(serve: Serve) -> None:
    backend = ToyBackend(rate=0.0)
    gateway = serve(backend, client_grace=0.4, max_in_flight=100)
    asked = [request("leased", 80), request("queued", 90)]
    gone = connect(gateway.address, client_id="gone")
    for each in asked:
        gone.submit([each])
    until(lambda: len(backend._work) == 80)
    backend.rate = 40.0
    until(lambda: gateway._ledger.counters.unique > 3)
    gone.close(acknowledge=False)
    backend.rate = 0.0
    until(lambda: not backend._work)
    with connect(gateway.address, client_id="other") as other:
        backend.rate = 1e9
        assert len(other.generate([request("o", 5)], timeout=10)) == 5
        assert other.push_weights(1, weights(1)) == 1
        assert other.status()["in_flight"] == 0
    with connect(gateway.address, client_id="gone") as back:
        keys = [t.key for t in back.generate(asked, timeout=10)]
        assert keys == [("leased", i) for i in range(80)] + [("queued", i) for i in range(90)]
        status = back.status()
        assert (status["requested"], status["unique"], status["missing"]) == (175, 175, 0)


def test_a_finish_push_does_not_wait_for_a_client_that_left_for_good(serve: Serve) -> None:
    backend = ToyBackend(rate=0.0)
    gateway = serve(backend, client_grace=0.4)
    gone = connect(gateway.address, client_id="gone")
    gone.submit([request("a", 1000)])
    until(lambda: len(backend._work) == 1000)
    assert gateway._ledger.outstanding == 1000
    gone.close(acknowledge=False)
    with connect(gateway.address, client_id="trainer") as trainer:
        assert trainer.push_weights(1, weights(1)) == 1
        status = trainer.status()
        assert (status["missing"], status["outstanding"]) == (1000, 0)  # no engine is needed for paused work


def test_a_connected_client_keeps_its_work_however_silent_it_is(serve: Serve) -> None:
    backend = ToyBackend(rate=0.0)
    with connect(serve(backend, client_grace=0.3).address, client_id="t") as client:
        client.submit([request("a", 3)])
        threading.Event().wait(1.2)
        assert len(backend._work) == 3


def test_a_pause_outlives_the_gateway_and_none_is_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "l"
    ledger = Ledger(path)
    record(ledger, request("a", 2), client="gone")
    record(ledger, request("b"), client="gone", batch="half", final=False)
    record(ledger, request("c"), client="here", batch="c")
    assert ledger.clients_at_work() == {"gone", "here"}
    assert ledger.pause("gone") == []
    assert ledger.clients_at_work() == {"here"}
    ledger.close()
    again = Ledger(path)
    assert again.clients_at_work() == {"here"}
    assert [r.id for r in again.lease(100)[1]] == ["c"]  # type: ignore[index]
    assert again.lease(100) is None
    again.resume("gone")
    assert again.lease(100) == (2, [request("a", 2)])
    assert again.pause("gone") == ["a"]
    again.close()
    with Gateway(ToyBackend(), "tcp://127.0.0.1:*", path, client_grace=None) as gateway:
        with connect(gateway.address, client_id="gone") as back:
            assert len(back.generate([request("a", 2)], timeout=10)) == 2


def test_samples_are_bounded_per_request_and_per_client(serve: Serve) -> None:
    backend = ToyBackend(rate=0.0)
    gateway = serve(backend, max_request_samples=8, max_client_samples=20)
    with connect(gateway.address, client_id="t") as client:
        with pytest.raises(RequestRefused, match="request 'big' has 9, at most 8 are taken; split the group"):
            client.generate([request("big", 9)])
        client.submit([request(f"r{i}", 8) for i in range(2)])
        with pytest.raises(RequestRefused, match="would have 24 unfinished, at most 20 are taken; collect results"):
            client.generate([request("more", 8)])
        client.submit([request("r0", 8), request("fits", 4)])
        with connect(gateway.address, client_id="u") as other:
            other.submit([request("theirs", 8)])
            client.cancel(["r0"])
            client.submit([request("again", 8)])
            backend.rate = 1e9
            assert len(list(client.results(timeout=10))) == 20
            assert client.delivery["missing"] == 0
            assert len(list(other.results(timeout=10))) == 8
        with pytest.raises(RequestError, match="65536"):
            client.submit([request("huge", 1 << 17)])
