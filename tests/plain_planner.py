"""A plain planner: every schedule anew at every step, one sample and one observation at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from blockroll.rollout.planning.planner import (
    _AR,
    _HORIZON,
    _NEAR,
    _PROBE_EVERY,
    PROBE_SHARE,
    Decision,
    Kind,
    Planner,
    _kind,
)
from blockroll.rollout.planning.survival import (
    _EASE,
    _KIN,
    _MEMORY,
    _WEIGHT,
    _alive,
    _leaning,
    _moments,
    chain,
    lasting,
)
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.sequence import Sample


class PlainSurvival:
    """See `Survival`."""

    def __init__(self, slots: int, prior: float) -> None:
        self._prior = prior
        # [two_pass or fused, first or later, tries or hits, slot]
        self._seen = np.zeros((2, 2, 2, slots + 1))
        self._expected: dict[Schedule, tuple[float, float]] = {}
        self._reached: dict[int, np.ndarray] = {}
        self._tries, self._fresh = [0.0, 0.0], [0, 0]

    def note(self, slot: int, drafted: int, accepted: int) -> None:
        """Count one sample's step: of `drafted` drafts, the first one in `slot`, `accepted` were accepted."""
        if not drafted:
            return
        kind = int(slot > 0)
        seen = self._seen[kind]
        first, later = seen
        first[0, slot] += 1
        first[1, slot] += accepted > 0
        if accepted:
            later[0, slot + 1 : slot + min(accepted + 1, drafted)] += 1
            later[1, slot + 1 : slot + accepted] += 1
        self._fresh[kind] += min(accepted + 1, drafted)
        # What is known changes slowly once much is known.
        if self._fresh[kind] > 4 + self._tries[kind] / 4:
            self._expected.clear()
            self._reached.clear()
            if seen[:, 0].sum() > _MEMORY:
                seen *= 0.5
            self._tries, self._fresh = self._seen[:, :, 0].sum((1, 2)).tolist(), [0, 0]

    def fade(self) -> None:
        """Reduce the weight of all observations so far by 5 %."""
        self._seen *= 0.95

    def rates(self, slot: int) -> tuple[np.ndarray, np.ndarray]:
        """first_B, later_B: acceptance by slot, of a block whose drafts begin in `slot`."""
        fused = slot > 0
        (first, later), (_, other) = self._seen[int(fused)], self._seen[int(not fused)]
        rate, odds, borrowed = _leaning(other.sum(-1), self._prior, _WEIGHT), 1.0, _WEIGHT
        if other[0].any():
            odds, borrowed = 1 / _EASE if fused else _EASE, _KIN
        first_rate, later_rate = rate if fused else 1.0, odds * rate / (1 + (odds - 1) * rate)
        first_rate, later_rate = (
            _leaning(seen.sum(-1), known, borrowed) for seen, known in ((first, first_rate), (later, later_rate))
        )
        return _leaning(first, first_rate, _WEIGHT), _leaning(later, later_rate, _WEIGHT)

    def tokens(self, schedule: Schedule) -> float:
        """Expected tokens per step of one sample, in the long run; `schedule` has its sizes (`Schedule.within`)."""
        return self._mean(schedule)[0]

    def past(self, schedule: Schedule) -> float:
        """Tokens that the step which reaches some given length makes beyond it, on average: (E[n^2] / E[n] - 1) / 2 of the
        tokens n of a step (the inspection paradox: that step is more likely a long one)."""
        tokens, squares = self._mean(schedule)
        return (squares / tokens - 1) / 2

    def _mean(self, schedule: Schedule) -> tuple[float, float]:
        """Means of a step's tokens and of their squares."""
        known = self._expected.get(schedule)
        if known is not None:
            return known
        if schedule.kind == "ar":
            found = 1.0, 1.0
        elif schedule.kind == "two_pass":
            assert schedule.drafts is not None
            tokens, squares = _moments(self._alive(0)[0, : schedule.drafts])
            found = float(tokens), float(squares)
        else:
            move, gain, square = chain(schedule, self._alive(1))
            share = lasting(move)
            found = float(share @ gain), float(share @ square)
        self._expected[schedule] = found
        return found

    def _alive(self, kind: int) -> np.ndarray:
        known = self._reached.get(kind)
        if known is None:
            known = self._reached[kind] = _alive(self.rates(kind))
        return known


class PlainPlanner(Planner):
    """See `Planner`."""

    _survival: dict[Kind, Any]

    def choose(self, decoding: Sequence[Sample]) -> Schedule:
        """The schedule of the step that decodes these samples."""
        self._settle()
        kinds: dict[Kind, int] = {}
        waiting = drafting = remaining = context = 0
        for sample in decoding:
            context += len(sample.tokens)
            if sample.request.params.sampler != "ar":
                kind = _kind(sample)
                kinds[kind] = kinds.get(kind, 0) + 1
                drafting += 1
                waiting += sample.draft_count > 0
                remaining += sample.remaining
        batch = len(decoding)
        if not drafting:
            self._decision = None
            return _AR
        mean_context = context / batch
        if self._pinned and self._decision is not None and self._decision.probe:
            self._pinned -= 1
            decision = self._decide(self._decision.schedule, kinds, batch, mean_context, probe=True)
        else:
            decision = self._best(kinds, batch, mean_context, remaining / drafting, 1 - waiting / drafting)
        self._decision = decision
        self._total += decision.expected_seconds
        self.log.append(decision)
        return decision.schedule

    def observe(self, decoding: Sequence[Sample], seconds: float | None) -> None:
        """Learn from the step that was chosen last, after its commit.

        Args:
            seconds: how long the step took; None when it prefilled too.
        """
        decision = self._decision
        if decision is None:
            return
        made = 0
        for sample in decoding:
            step = sample.last_step
            made += step.accepted + 1
            # A step that hit `max_tokens` was cut short, so its number of accepted drafts says nothing.
            if step.drafted and sample.finish in (None, "stop"):
                accepted = min(step.accepted, sample.anchor - step.anchor - 1)
                self._of(_kind(sample)).note(step.anchor + 1 - step.draft_start, step.drafted, accepted)
        decision.tokens = made / len(decoding)
        if seconds is None:
            return
        decision.seconds = seconds
        if not self.repeatable:
            drafted = [(sample, sample.anchor + self._block_size) for sample in decoding if sample.finish is None]
            self._late.append((decision, drafted))

    def _best(self, kinds: dict[Kind, int], batch: int, context: float, remaining: float, cold: float) -> Decision:
        ranked, horizon = [], min(remaining, _HORIZON)
        for schedule in self.schedules:
            decision = self._decide(schedule, kinds, batch, context, probe=False)
            tokens = decision.expected_tokens
            past = self._past(schedule, kinds, batch) if remaining <= _HORIZON else 0.0
            steps = (horizon + past) / tokens
            if schedule.kind == "fused":
                steps += cold * (1 - 1 / tokens)
            ranked.append((decision.expected_seconds * steps, decision))
        ranked.sort(key=lambda pair: pair[0])
        best = ranked[0][1]
        self._since += 1
        if self._since < _PROBE_EVERY:
            return best
        # `ar` teaches nothing about drafts.
        others = [(seconds, decision) for seconds, decision in ranked[1:] if decision.schedule.kind != "ar"]
        near = [decision for seconds, decision in others if seconds <= _NEAR * ranked[0][0]] or [others[0][1]]
        # Every other time it is the kind of block that is not learnt from otherwise.
        unlike = next((decision for decision in near if decision.schedule.kind != best.schedule.kind), near[0])
        second = unlike if self._turn % 2 else near[self._turn // 2 % len(near)]
        # The second step of `fused` is the first with drafts to verify; turning back costs a step without them.
        steps = 2 if second.schedule.kind == "fused" and best.schedule.kind != "fused" else 1
        back = 1.0 if best.schedule.kind == "fused" and second.schedule.kind != "fused" else 0.0
        rate = best.expected_tokens / best.expected_seconds
        excess = steps * (second.expected_seconds - 1 / rate)
        excess += back * best.expected_seconds * (1 - 1 / best.expected_tokens)
        if self._probed + excess > PROBE_SHARE * self._total:
            return best
        self._since, self._pinned, second.probe = 0, steps - 1, True
        self._turn += 1
        self._probed += max(excess, 0.0)
        if best.schedule.kind == "ar":  # nothing else is learnt from, and a policy in training moves
            for kind in kinds:
                self._of(kind).fade()
        return second

    def _decide(self, schedule: Schedule, kinds: dict[Kind, int], batch: int, context: float, probe: bool) -> Decision:
        tokens = float(batch)
        for kind, count in kinds.items():
            tokens += count * (self._of(kind).tokens(schedule) - 1.0)
        return Decision(schedule, batch, context, self.costs.seconds(schedule, batch, context), tokens / batch, probe)

    def _past(self, schedule: Schedule, kinds: dict[Kind, int], batch: int) -> float:
        return sum(count * self._of(kind).past(schedule) for kind, count in kinds.items()) / batch

    def _of(self, kind: Kind) -> Any:
        if kind not in self._survival:
            self._survival[kind] = PlainSurvival(self._block_size, self._prior)
        return self._survival[kind]
