"""What a search spends, and the budget that holds it back.

Invariants:
- `budget_tokens` is never exceeded: a request is made only when all tokens it may generate are left. Prompt tokens are not
  counted.
- After `budget_seconds` nothing is begun and what runs is cancelled, between two decode steps in this process, and as soon as the
  gateway hears of it through a service.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(slots=True)
class Spent:
    """What a search has used.

    Attributes:
        tokens: generated tokens, those of cancelled samples included where they are known.
        forwards: decode forward passes of all samples; prefill is not counted.
        seconds: by the clock, from the first request on. Searches that run side by side share the machine.
        samples: requests that ended, pieces of samples included.
        cancelled: requests that were cancelled. A service does not say how many tokens these had.
    """

    tokens: int = 0
    forwards: int = 0
    seconds: float = 0.0
    samples: int = 0
    cancelled: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON; milliseconds are enough."""
        return {**asdict(self), "seconds": round(self.seconds, 3)}


class Spending:
    """Counts what one search spends against its budget.

    Args:
        budget_tokens, budget_seconds: most of each; None for any number.
        clock: seconds, rising.
    """

    def __init__(
        self, budget_tokens: int | None = None, budget_seconds: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        self.spent = Spent()
        self.budget_tokens, self.budget_seconds, self._clock = budget_tokens, budget_seconds, clock
        self._start: float | None = None
        self._reserved = 0

    def begin(self) -> None:
        """The clock runs from now on."""
        if self._start is None:
            self._start = self._clock()

    @property
    def elapsed(self) -> float:
        """Seconds since `begin`."""
        return 0.0 if self._start is None else self._clock() - self._start

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the budget is out, at least 0; None where there is no budget."""
        return None if self.budget_seconds is None else max(self.budget_seconds - self.elapsed, 0.0)

    @property
    def tokens_left(self) -> int | None:
        """Tokens that may still be asked for; None where there is no budget."""
        return None if self.budget_tokens is None else self.budget_tokens - self.spent.tokens - self._reserved

    def affords(self, samples: int, max_tokens: int) -> tuple[int, int]:
        """How many samples may begin now, up to `samples`, and how many tokens each may have, up to `max_tokens`. What is left of
        the tokens goes to one shorter sample. (0, 0) when the budget is out."""
        if self.seconds_left == 0.0:
            return 0, 0
        left = self.tokens_left
        if left is None:
            return samples, max_tokens
        if left >= max_tokens:
            return min(samples, left // max_tokens), max_tokens
        return (1, left) if left > 0 and samples else (0, 0)

    def reserve(self, tokens: int) -> None:
        """A request was made that may generate so many."""
        self._reserved += tokens

    def settle(self, reserved: int, tokens: int, forwards: int, cancelled: bool = False) -> None:
        """A request ended with so many tokens of those reserved for it."""
        self._reserved -= reserved
        self.spent.tokens += tokens
        self.spent.forwards += forwards
        self.spent.samples += not cancelled
        self.spent.cancelled += cancelled
        self.spent.seconds = self.elapsed

    @property
    def reason(self) -> str | None:
        """Which budget is out: `budget_seconds`, `budget_tokens`, or None."""
        if self.seconds_left == 0.0:
            return "budget_seconds"
        left = self.tokens_left
        return "budget_tokens" if left is not None and left <= 0 else None
