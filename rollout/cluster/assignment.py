"""One worker's part of a batch, and which of its samples have come."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from ..backend import Completed
from ..types import RolloutRequest


@dataclass
class Assignment:
    """Requests of one lease that one worker serves, in this order.

    Attributes:
        epoch: the lease.
        done: per request id, the numbers of the samples that have come.
        failed: ids of requests that cannot be served.
        cancelled: ids of requests that are not wanted.
        deaths: actors that have died over it since the last sample.
    """

    batch: list[RolloutRequest]
    epoch: int
    done: defaultdict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    failed: set[str] = field(default_factory=set)
    cancelled: set[str] = field(default_factory=set)
    deaths: int = 0

    def take(self, item: Completed) -> bool:
        """Notes a sample or a failure; False when it had come before or is not wanted."""
        if item.request_id in self.cancelled:
            return False
        if item.trajectory is None:
            new = item.request_id not in self.failed
            self.failed.add(item.request_id)
        else:
            numbers = self.done[item.request_id]
            new = item.trajectory.sample not in numbers
            numbers.add(item.trajectory.sample)
        return new

    def cancel(self, request_ids: Collection[str]) -> list[str]:
        """Takes some requests out; returns the ids of those that were unfinished here."""
        ended = [request.id for request in self.unfinished() if request.id in request_ids]
        self.cancelled.update(ended)
        return ended

    def unfinished(self) -> list[RolloutRequest]:
        """Requests of which samples are to come."""
        over = self.failed | self.cancelled
        return [r for r in self.batch if r.id not in over and len(self.done[r.id]) < r.samples]

    def unwanted(self) -> Mapping[str, frozenset[int]]:
        """Per unfinished request, the numbers of the samples that have come."""
        return {r.id: frozenset(self.done[r.id]) for r in self.unfinished()}
