"""What a client knows of its requests: counts that add up, whatever arrives in whatever order."""

from __future__ import annotations

import pytest
from bridge_parts import make_trajectory, request

from blockroll.errors import RequestError, TransportError
from blockroll.rollout.types import RolloutRequest
from blockroll.trainer_bridge.client.collector import Collector
from blockroll.trainer_bridge.client.connection import RequestRefused
from blockroll.trainer_bridge.client.pending_requests import PendingRequests
from blockroll.trainer_bridge.wire.messages import Submitted
from blockroll.trainer_bridge.wire.records import FAILURE, encode_trajectory


def arrives(pending: PendingRequests, asked: RolloutRequest, sample: int) -> None:
    pending.deliver(asked.id, sample, encode_trajectory(make_trajectory(asked, sample)))


def test_a_request_that_failed_after_part_of_it_was_acknowledged_leaves_nothing_missing() -> None:
    """The failure arrives first; the receipt then says that an earlier life acknowledged two samples."""
    pending, asked = PendingRequests(), request("a", 4)
    pending.fail("a", "the engine failed")
    pending.submit([asked, request("b")])
    name = next(iter(pending.batches))
    assert [part.requests for part in pending.parts()] == [(pending._record("b"),)]
    pending.receipt(Submitted(name, 0, (0,), ()))
    assert (pending.requested, pending.failed, pending.missing) == (5, 4, 1)
    late = PendingRequests()
    late.submit([asked])
    name = next(iter(late.batches))
    list(late.parts())
    late.fail("a", "the engine failed")
    late.receipt(Submitted(name, 0, (2,), ()))
    assert (late.requested, late.failed, late.missing) == (2, 2, 0)


def test_parts_are_sent_within_their_window_and_once() -> None:
    pending = PendingRequests()
    name = pending.submit([request(f"r{i:03}") for i in range(584)])
    parts = list(pending.parts())
    assert [(p.index, p.final, len(p.requests)) for p in parts] == [(i, False, 32) for i in range(16)]
    assert list(pending.parts()) == []
    for i in range(16):
        pending.receipt(Submitted(name, i, (0,) * 32, ()))
    assert [(p.index, p.final, len(p.requests)) for p in pending.parts()] == [(16, False, 32), (17, False, 32), (18, True, 8)]
    assert not pending.recorded(name)
    pending.restart()
    assert [p.index for p in pending.parts()] == list(range(16))
    with pytest.raises(TransportError, match="nobody sent it"):
        pending.receipt(Submitted(name, 2, (0,) * 32, ()))


def test_a_collector_takes_its_own_and_puts_everything_back() -> None:
    pending, mine, other = PendingRequests(), request("mine", 2), request("other")
    pending.submit([mine, other, request("bad")])
    for asked, sample in ((mine, 1), (other, 0), (mine, 0)):
        arrives(pending, asked, sample)
    pending.fail("bad", "too long")
    full = pending.inbox_bytes
    assert full > 0 and not pending.outstanding and pending.complete(["mine", "other", "bad"])
    assert len(pending.inbox) == 4, "asking whether requests are complete takes nothing from the inbox"
    collector = Collector(pending, {"mine", "bad"})
    collector.drain()
    assert [t.key for _, t in collector.found] == [("mine", 1), ("mine", 0)]
    assert list(collector.refused) == ["bad"] and [item.request_id for item in pending.inbox] == ["other"]
    arrives(pending, request("late"), 0)
    assert pending.inbox_bytes == 0
    with pytest.raises(RequestError, match="collected by another call"):
        Collector(pending, {"mine"})
    collector.release()
    collector.put_back()
    assert [item.request_id for item in pending.inbox] == ["bad", "mine", "mine", "other", "late"]
    assert isinstance(pending.inbox[0], RequestRefused)
    arrives(pending, request("later"), 0)
    assert pending.inbox_bytes > 0


def test_counts_of_a_whole_life() -> None:
    pending, asked = PendingRequests(), request("a", 2)
    pending.submit([asked])
    for sample in (0, 1, 0):
        arrives(pending, asked, sample)
    assert (pending.requested, pending.unique, pending.duplicates, pending.missing) == (2, 0, 1, 2)
    for sample in (0, 1):
        pending.take()
        pending.hand_out("a", sample)
    with pytest.raises(RequestError, match="already answered"):
        pending.submit([asked])
    pending.confirm([("a", 0), ("a", 1), ("a", FAILURE)][:2])
    assert (pending.requests, pending.missing, pending.unique) == ({}, 0, 2)
