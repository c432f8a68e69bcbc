"""A plain planner: it keeps nothing that a step can work out anew, and counts in arrays, schedule by schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from blockroll.rollout.planning.planner import Planner
from blockroll.rollout.planning.step_batch import Kind, StepBatch
from blockroll.rollout.planning.survival import (
    _EASE,
    _FRESH,
    _KIN,
    _MEMORY,
    _WEIGHT,
    Means,
    Survival,
    _alive,
    _moments,
    chain,
    lasting,
)
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.sequence import Sample


def _drawn(seen: np.ndarray, rate: Any, borrowed: float) -> Any:
    """The rate of [tries, hits], as if `borrowed` more tries had had `rate`."""
    return (seen[1] + borrowed * rate) / (seen[0] + borrowed)


class PlainSurvival(Survival):
    """See `Survival`. Its rates change at the same observations, from counts [two_pass or fused, first or later, tries or hits,
    slot]."""

    def __init__(self, slots: int, prior: float) -> None:
        super().__init__(slots, prior)
        self._counted = np.zeros((2, 2, 2, slots + 1))
        self._waiting: tuple[list, list] = ([], [])
        self._found: dict[Schedule, tuple[float, float]] = {}

    def note_all(self, slot_S: list[int] | None, drafted_S: list[int], accepted_S: list[int]) -> bool:
        """Count what a step made of the drafts of its samples. Returns whether the estimates change by this."""
        kind = int(slot_S is not None)
        self._waiting[kind].extend(zip(slot_S or [0] * len(drafted_S), drafted_S, accepted_S, strict=True))
        self._fresh[kind] += sum(accepted + 1 for accepted in accepted_S)
        if self._fresh[kind] <= self._most_fresh[kind]:
            return False
        self._count(kind)
        if self._counted[kind, :, 0].sum() > _MEMORY:
            self._counted[kind] *= 0.5
        self._fresh[kind], self._most_fresh[kind] = 0, _FRESH + self._counted[kind, :, 0].sum() / 2
        self._found.clear()
        return True

    def _count(self, kind: int) -> None:
        for slot, drafted, accepted in self._waiting[kind]:
            for i in range(min(accepted + 1, drafted)):
                self._counted[kind, int(i > 0), :, slot + i] += (1, i < accepted)
        self._waiting[kind].clear()

    def fade(self) -> None:
        """Reduce the weight of all observations so far by 5 %."""
        for kind in (0, 1):
            self._count(kind)
        self._counted *= 0.95

    def rates(self, slot: int) -> tuple[np.ndarray, np.ndarray]:
        """first_B, later_B: acceptance by slot, of a block whose drafts begin in `slot`."""
        fused = slot > 0
        (first, later), (_, other) = self._counted[int(fused)], self._counted[int(not fused)]
        rate, odds, borrowed = _drawn(other.sum(-1), self._prior, _WEIGHT), 1.0, _WEIGHT
        if other[0].any():
            rate, odds, borrowed = round(float(rate), 2), 1 / _EASE if fused else _EASE, _KIN
        hints = rate if fused else 1.0, odds * rate / (1 + (odds - 1) * rate)
        first_rate, later_rate = (_drawn(seen.sum(-1), hint, borrowed) for seen, hint in zip((first, later), hints, strict=True))
        return _drawn(first, first_rate, _WEIGHT), _drawn(later, later_rate, _WEIGHT)

    def means(self, schedules: Sequence[Schedule]) -> Means:
        """`tokens` and `past` of each schedule."""
        return [self._mean(schedule) for schedule in schedules]

    def _mean(self, schedule: Schedule) -> tuple[float, float]:
        if schedule not in self._found:
            tokens = squares = 1.0
            if schedule.kind == "two_pass":
                tokens, squares = map(float, _moments(_alive(self.rates(0))[0, : schedule.drafts]))
            if schedule.kind == "fused":
                move, gain, square = chain(schedule, _alive(self.rates(1)))
                tokens, squares = (float(lasting(move) @ mean) for mean in (gain, square))
            self._found[schedule] = tokens, (squares / tokens - 1) / 2
        return self._found[schedule]


class PlainPlanner(Planner):
    """See `Planner`."""

    def choose(self, decoding: Sequence[Sample]) -> Schedule:
        """The schedule of the step that decodes these samples."""
        self._batch = StepBatch.of(self._batch.samples)
        return super().choose(decoding)

    def observe(self, decoding: Sequence[Sample], seconds: float | None) -> None:
        """Learn from the step that was chosen last, after its commit."""
        self._batch = StepBatch.of(decoding)
        super().observe(decoding, seconds)

    def _means(self) -> Means:
        batch, schedules = self._batch, self.schedules
        found = []
        for schedule in schedules:
            drawn = [self._of(kind).means([schedule])[0] for kind in batch.kind_S if kind[0] != "ar"]
            tokens, past = (sum(each[i] for each in drawn) for i in (0, 1))
            others, count = len(batch.samples) - len(drawn), len(batch.samples)
            found.append(((tokens + others) / count, past / count))
        return found

    def _of(self, kind: Kind) -> Survival:
        if kind not in self._survival:
            self._survival[kind] = PlainSurvival(self._block_size, self._prior)
        return self._survival[kind]
