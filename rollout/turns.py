"""Fair shares of an engine: whose sample is next, and whose makes place, where samples of several clients are here.

Invariants:
- With one client the order is that of arrival.
- Of a client's own samples the oldest is never given up for another client's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from .sample_group import SampleGroup, age
from .sequence import Sample


def next_group(waiting: Iterable[SampleGroup], passed: Collection[SampleGroup], running: list[Sample]) -> SampleGroup | None:
    """The group whose turn it is, but for those passed over: the oldest, of the client with the fewest running samples."""
    count = Counter(sample.client for sample in running)
    return min((group for group in waiting if group not in passed), key=lambda g: (count[g.client], g.arrival), default=None)


def youngest(running: list[Sample]) -> Sample:
    """The sample to preempt: the youngest, of the client with most running samples."""
    count = Counter(sample.client for sample in running)
    return max(running, key=lambda sample: (count[sample.client], age(sample)))


def above_share(running: list[Sample], client: str) -> Sample | None:
    """The sample that makes place for one of `client`: the youngest of the client with most running samples, if those are at
    least two more than this client's; so no two clients take places from each other in turn."""
    count = Counter(sample.client for sample in running)
    return youngest(running) if max(count.values(), default=0) - count[client] >= 2 else None


def in_turn(running: list[Sample]) -> list[Sample]:
    """The order in which samples prefill: the oldest of every client first, then the second oldest of every client, and so on."""
    oldest_first = sorted(running, key=age)
    if len({sample.client for sample in running}) <= 1:
        return oldest_first
    ranks, before = {}, Counter[str]()
    for sample in oldest_first:
        ranks[sample] = before[sample.client], age(sample)
        before[sample.client] += 1
    return sorted(running, key=ranks.__getitem__)
