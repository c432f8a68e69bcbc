"""A plain planner: it keeps nothing that a step can work out anew, and counts in arrays, schedule by schedule."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from blockroll.rollout.planning.planner import Kind, Planner, _Batch
from blockroll.rollout.planning.survival import (
    _FRESH,
    _MEMORY,
    Means,
    Outcome,
    Survival,
    _alive,
    _moments,
    chain,
    lasting,
)
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.sequence import Sample


class PlainSurvival(Survival):
    """See `Survival`. Its rates change at the same observations, from counts [two_pass or fused, first or later, tries or hits,
    slot]."""

    def __init__(self, slots: int, prior: float) -> None:
        super().__init__(slots, prior)
        self._tries = [0.0, 0.0]
        self._counted = np.zeros((2, 2, 2, slots + 1))
        self._found: dict[Schedule, tuple[float, float]] = {}

    def note_all(self, outcomes: Sequence[Outcome]) -> bool:
        """Count what a step made of the drafts of its samples. Returns whether the estimates change by this."""
        for slot, drafted, accepted in outcomes:
            kind, tried = int(slot > 0), min(accepted + 1, drafted)
            for i in range(tried):
                self._counted[kind, int(i > 0), :, slot + i] += (1, i < accepted)
            self._fresh[kind] += tried
        changes = [kind for kind in (0, 1) if self._fresh[kind] > _FRESH + self._tries[kind] / 2]
        if changes:
            self._found.clear()
            for kind in changes:
                if self._counted[kind, :, 0].sum() > _MEMORY:
                    self._counted[kind] *= 0.5
            self._tries, self._fresh = [float(each[:, 0].sum()) for each in self._counted], [0, 0]
        return bool(changes)

    def fade(self) -> None:
        """Reduce the weight of all observations so far by 5 %."""
        self._counted *= 0.95

    def _counts(self) -> np.ndarray:
        return self._counted

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
        self._batch = _Batch.of(self._batch.samples)
        return super().choose(decoding)

    def observe(self, decoding: Sequence[Sample], seconds: float | None) -> None:
        """Learn from the step that was chosen last, after its commit."""
        self._batch = _Batch.of(decoding)
        super().observe(decoding, seconds)

    def _expected(self, context: float, ending: bool) -> tuple[list[float], list[float], list[float]]:
        batch, schedules = self._batch, self.schedules
        means = [[self._of(kind).means([schedule])[0] for kind in batch.kind_S] for schedule in schedules]
        drafts = [sample.request.params.sampler != "ar" for sample in batch.samples]
        tokens = [sum(each[0] if drawn else 1.0 for each, drawn in zip(line, drafts, strict=True)) for line in means]
        past = [sum(each[1] for each, drawn in zip(line, drafts, strict=True) if drawn and ending) for line in means]
        count = len(batch.samples)
        seconds = [self.costs.seconds(schedule, count, context) for schedule in schedules]
        return seconds, [each / count for each in tokens], [each / count for each in past]

    def _of(self, kind: Kind) -> Survival:
        if kind not in self._survival:
            self._survival[kind] = PlainSurvival(self._block_size, self._prior)
        return self._survival[kind]
