"""The unfinished samples of one request, as the scheduler keeps them, and the order of samples."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter

from .sequence import Sample


@dataclass(eq=False, slots=True)
class SampleGroup:
    """The unfinished samples of one request.

    Attributes:
        arrival: number of the request, in the order of arrival.
        client: whose request it is.
        unfinished: samples that wait or run.
        fresh: waiting samples without a generated token, by number: they may share the group's prompt.
        resumed: other waiting samples, preempted before, by number.
    """

    arrival: int
    client: str = ""
    unfinished: int = 0
    fresh: deque[Sample] = field(default_factory=deque)
    resumed: deque[Sample] = field(default_factory=deque)

    @property
    def waits(self) -> bool:
        """Whether a sample waits."""
        return bool(self.fresh or self.resumed)

    def queue(self, fresh_too: bool) -> deque[Sample] | None:
        """The queue whose first sample is next; None where no sample may be next.

        Args:
            fresh_too: whether fresh samples may be next.
        """
        fresh, resumed = self.fresh if fresh_too else None, self.resumed
        if not fresh:
            return resumed or None
        return resumed if resumed and resumed[0].number < fresh[0].number else fresh

    def wait(self, sample: Sample) -> None:
        """Put a sample into its queue."""
        queue = self.fresh if is_fresh(sample) else self.resumed
        if not queue or queue[-1].number < sample.number:
            queue.append(sample)
        elif sample.number < queue[0].number:
            queue.appendleft(sample)
        else:
            insort(queue, sample, key=lambda other: other.number)


age: Callable[[Sample], tuple[int, int]] = attrgetter("age")
"""Sorts samples, oldest first."""


def is_fresh(sample: Sample) -> bool:
    """Whether no token has been generated."""
    return len(sample.tokens) == len(sample.request.prompt_tokens)


def fills(sample: Sample) -> bool:
    """Whether a running sample has rows to prefill, or has not run yet."""
    table = sample.block_table
    return table is not None and (not table.length or table.length < len(sample.tokens) - 1)
