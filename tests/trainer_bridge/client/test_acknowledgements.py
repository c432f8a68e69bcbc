"""Trajectories that are taken together, and acknowledgements that go together."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from bridge_parts import ToyBackend, request, until

from blockroll.errors import TransportError
from blockroll.rollout.types import Trajectory
from blockroll.trainer_bridge.client import RequestRefused, connect
from blockroll.trainer_bridge.client.handed_out import opened
from blockroll.trainer_bridge.client.pending_requests import PendingRequests
from blockroll.trainer_bridge.gateway import Gateway
from blockroll.trainer_bridge.gateway.ledger import Ledger
from blockroll.trainer_bridge.wire.records import encode_trajectory


def test_a_write_of_the_ledger_acknowledges_all_that_came_meanwhile(
    serve: Callable[..., Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    writes, acknowledge = list[int](), Ledger.acknowledge

    def counted(ledger: Ledger, client: str, keys: Any) -> int:
        writes.append(len(keys))
        return acknowledge(ledger, client, keys)

    monkeypatch.setattr(Ledger, "acknowledge", counted)
    gateway = serve(ToyBackend())
    with connect(gateway.address, client_id="t", timeout=20) as client:
        client.submit([request(f"r{i}") for i in range(300)])
        assert len({trajectory.key for trajectory in client.results(timeout=10)}) == 300
    assert sum(writes) == 300 and len(writes) < 30


@pytest.mark.parametrize("fails", [False, True])
def test_acknowledgements_reach_a_slow_gateway_though_the_client_does_nothing_more(
    fails: bool, serve: Callable[..., Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the end of `results`, where the client trains; and where it ends by an error, but for the sample it had then."""
    acknowledge = Ledger.acknowledge

    def slow(ledger: Ledger, client: str, keys: Any) -> int:
        time.sleep(0.1)
        return acknowledge(ledger, client, keys)

    monkeypatch.setattr(Ledger, "acknowledge", slow)
    gateway, taken, wanted = serve(ToyBackend()), 0, 200 if fails else 300
    try:
        with connect(gateway.address, client_id="t", timeout=20) as client:
            client.submit([request(f"r{i}") for i in range(300)])
            for _ in client.results(timeout=10):
                taken += 1
                if fails and taken == 201:
                    raise KeyError(taken)
            until(lambda: gateway._ledger.counters.acknowledged == wanted, 20)
    except KeyError:
        assert fails
    until(lambda: gateway._ledger.counters.acknowledged >= wanted, 20)
    time.sleep(0.3)
    assert gateway._ledger.counters.acknowledged == wanted


def test_what_is_taken_together_ends_before_a_refusal_and_before_what_cannot_be_read() -> None:
    pending = PendingRequests()
    asked = [request(name) for name in ("a", "b", "c", "d", "e")]
    pending.submit(asked)
    blobs = {each.id: encode_trajectory(Trajectory.aborted(each, 0)) for each in asked}
    for name in ("a", "b"):
        pending.deliver(name, 0, blobs[name])
    pending.fail("c", "too long")
    pending.deliver("d", 0, blobs["d"])
    pending.deliver("e", 0, blobs["a"])  # it is another one
    assert [item.request_id for item, _ in opened(pending, 1)] == ["a"]
    assert [item.request_id for item, _ in opened(pending, 9)] == ["b"] and opened(pending, 9) == []
    assert isinstance(pending.take(), RequestRefused)
    assert [item.request_id for item, _ in opened(pending, 9)] == ["d"]
    with pytest.raises(TransportError, match="'e'"):
        opened(pending, 9)
    assert not pending.inbox and pending.inbox_bytes == 0
