"""Collects a batch for `generate`, and what it returns: the samples in order, or the refusals."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from ...rollout.types import Trajectory, order_by_id
from .arguments import OnError
from .collector import Collector
from .connection import RequestRefused
from .pending_requests import PendingRequests


def collect(pending: PendingRequests, wanted: Collection[str], deadline_s: float | None,
            cancel: Callable[[list[str], str], object], run_until: Callable[[Callable[[], bool]], None]) -> Collector:
    """Collects all that comes of submitted requests. What is unfinished after `deadline_s` seconds is cancelled."""
    end = None if deadline_s is None else time.monotonic() + deadline_s
    collector = Collector(pending, wanted)

    def late() -> bool:
        return end is not None and time.monotonic() >= end and not any(pending.unconfirmed(each) for each in wanted)

    try:
        while True:
            run_until(lambda: bool(collector.items) or pending.complete(wanted) or late())
            collector.drain()
            if pending.complete(wanted):
                break
            if late():
                end = None
                cancel(sorted(wanted), f"its deadline of {deadline_s:g} s has passed")
    except BaseException:
        collector.release()
        collector.put_back()
        raise
    collector.release()
    return collector


def refusals(collector: Collector, pending: PendingRequests, wanted: Collection[str]) -> dict[str, RequestRefused]:
    """The refusals of a collected batch, by request id. A request of which samples were acknowledged before is one."""
    refused = dict(collector.refused)
    for request_id in wanted:
        if count := pending.requests[request_id].acknowledged_before:
            refused.setdefault(request_id, RequestRefused(
                request_id, f"{count} samples were acknowledged in an earlier life of this client"))
    return refused


def served(collector: Collector, pending: PendingRequests, refused: Collection[str], on_error: OnError) -> list[Trajectory]:
    """The trajectories to return, ordered by (id, sample); puts the others back into the inbox."""
    returned = [] if refused and on_error == "raise" else [p for p in collector.found if p[0].request_id not in refused]
    if len(returned) < len(collector.found):
        pending.put_back([item for item, _ in collector.found if not returned or item.request_id in refused])
    return order_by_id([trajectory for _, trajectory in returned])


def joined(refused: dict[str, RequestRefused]) -> RequestRefused:
    """The refusal of the first request by id, with those of the others in its `others`."""
    first, *rest = (refused[request_id] for request_id in sorted(refused))
    first.others = tuple(rest)
    return first
