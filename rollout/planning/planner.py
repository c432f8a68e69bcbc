"""The planner: while decoding it chooses the schedule that makes the next tokens in the least time.

For the next G tokens of each sample a schedule needs

    seconds(schedule, batch, context) * ((G + past) / tokens + cold * (1 - 1 / tokens))

where `tokens` is the schedule's expected tokens per step (`survival`). `past` counts the tokens that the last step makes beyond
a sample's end; it is 0 where samples do not end within G tokens. `cold`, for `fused`, is the share of samples that have no
drafts waiting, because the last step proposed none. So `cold` is the price of changing to `fused`; changing away drops the
waiting drafts. Now and then the planner probes: it runs two steps of a schedule that is nearly as good, in order to learn. Probes
take at most `PROBE_SHARE` of the time, counted as if all their drafts were rejected. Only the first one, where `ar` seems best
and nothing was ever drafted, comes at once.

A choice stands for some steps, because comparing schedules takes the host's time, and little changes from step to step. Schedules
are compared again when there are a quarter more or fewer samples, of any kind or altogether, when acceptance rates were estimated
anew, when samples come near their ends, and after `_PROBE_EVERY` steps. The second step of each choice is timed, of probes as of
others: the first one also compares schedules, and finds its data further away where another schedule ran before it.

Invariants, for exactness. A sampler is exact under any schedule that is fixed in advance. It is also exact when each step's
schedule depends only on random numbers that no later draw uses again:
- A schedule is chosen before the step, from how many drafts earlier steps verified and accepted. Accepting `a` drafts reveals the
  random numbers of positions up to anchor + a + 1, and these positions are then committed. The random numbers of later positions
  will be used again, so nothing that depends on them is counted. Waiting drafts are counted, never read.
- A step's time can depend on tokens that were rejected, because they chose experts. So a step's time counts only after every
  sample of the step has committed all positions it had drafted by then.
- `coupled` gives the tokens of `ar` under any choice. With `repeatable` no measured time counts: then the same requests and the
  same table of step times give the same choices.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ..schedule import Schedule
from ..sequence import Sample
from .step_batch import Kind, StepBatch
from .step_costs import StepCosts
from .survival import Means, Survival

PROBE_SHARE = 0.015
_PROBE_EVERY = 24  # steps between two probes, at least; and the most that a choice stands for
_PROBE_STEPS = 2  # the first step is not timed, and that of `fused` has no drafts to verify
_NEAR = 1.5  # times the best one's seconds: what is probed in turn
_HORIZON = 32  # tokens looked ahead: a batch seldom stays as it is for longer
_LOG = 4096
_LATE = 64  # step times held back at once; where a sample waits for long, the oldest are given up
_AR = Schedule("ar").within(2)


@dataclass(slots=True)
class Decision:
    """One step: the schedule chosen, what was expected of the step, and what it made.

    Attributes:
        batch: samples decoding; context: their mean length in tokens, when the schedule was chosen.
        expected_seconds, expected_tokens: of one step in the long run, tokens per sample.
        seconds, tokens: of this step, tokens per sample; 0 until it has run.
        probe: the step was run in order to learn.
    """

    schedule: Schedule
    batch: int
    context: float
    expected_seconds: float
    expected_tokens: float
    probe: bool
    seconds: float = 0.0
    tokens: float = 0.0


def candidates(block_size: int) -> tuple[Schedule, ...]:
    """The distinct schedules a planner chooses from, with sizes for blocks of `block_size`."""
    b = block_size
    quarter, half = max(b // 4, 1), max(b // 2, 1)
    wanted = [
        Schedule("ar"),
        *(Schedule("two_pass", m) for m in (quarter, half, max(3 * b // 4, 1), b)),
        Schedule("fused", quarter, (0,), max(half, 2)),
        Schedule("fused", None, (0,), max(5 * b // 8, 2)),
        *(Schedule("fused", None, levels) for levels in ((0,), (0, quarter), (0, quarter, half))),
    ]
    return tuple(dict.fromkeys(schedule.within(b) for schedule in wanted))


class Planner:
    """Chooses schedules for one engine.

    Args:
        costs: step times of all `schedules`.
        schedules: the candidates, with sizes; `ar` is among them.
        block_size: most slots of a block.
        prior: acceptance rate of a draft before anything is seen.
        repeatable: ignore the measured times of steps.

    Attributes:
        log: the last decisions, oldest first.
    """

    def __init__(
        self,
        costs: StepCosts,
        schedules: Sequence[Schedule],
        block_size: int,
        *,
        prior: float = 0.7,
        repeatable: bool = False,
    ) -> None:
        self.costs, self.schedules, self.repeatable = costs, tuple(schedules), repeatable
        self.log: deque[Decision] = deque(maxlen=_LOG)
        self._block_size, self._prior = block_size, prior
        self._fused_N = [schedule.kind == "fused" for schedule in self.schedules]
        self._survival: dict[Kind, Survival] = {}
        self._decision: Decision | None = None
        self._batch = self._compared = StepBatch.of(())  # of the last step, and of the last choice
        # Of steps that were not counted: batch, whether it was a probe, `start`, `drafted` and `accepted` of the record.
        self._steps: list[tuple[StepBatch, bool, list[int], list[int], list[int]]] = []
        self._made, self._enough = 0, 0.0  # tokens of these steps: how many, and at how many the rates may change
        self._late: deque[tuple[Decision, list[tuple[Sample, int]]]] = deque()
        self._total = self._probed = 0.0
        self._since = self._turn = self._stands = 0
        self._first = self._timed = False

    def choose(self, decoding: Sequence[Sample]) -> Schedule:
        """The schedule of the step that decodes these samples."""
        if self._batch.samples != decoding:
            batch = self._batch = StepBatch.of(decoding, self._batch)
            probes = self._decision is not None and self._decision.probe
            if not (probes and batch.kinds) and not batch.is_like(self._compared):  # half a probe would have taught nothing
                self._stands = 0
        decision, self._first = self._decision, not self._stands
        if self._stands and decision is not None:
            self._stands -= 1
            self._since += 1
            decision = self._decision_of(
                decision.schedule, decision.context, decision.expected_seconds, decision.expected_tokens, decision.probe
            )
        else:
            decision = self._chosen() if self._batch.kinds else None
        self._decision = decision
        if decision is None:
            return _AR
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
        self._note(decoding, decision)
        if seconds is None:
            return
        decision.seconds = seconds
        if not (self._first or self._timed or self.repeatable):
            self._timed = True
            ends = [(sample, sample.anchor + self._block_size) for sample in decoding if sample.finish is None]
            self._late.append((decision, ends))

    def _note(self, decoding: Sequence[Sample], decision: Decision) -> None:
        """Note what a step made."""
        kind, count = decision.schedule.kind, len(decoding)
        if kind == "ar":
            decision.tokens = 1.0
            return
        # The record of a step serves all its samples. A log that was made meanwhile says the same, sample by sample.
        record = decoding[0].log.record if kind == "two_pass" else None
        slot_S: list[int] | None = None
        if record is not None:
            start_S, drafted_S, accepted_S = record.start, record.drafted, record.accepted
        else:
            steps = [sample.last_step for sample in decoding]
            start_S, drafted_S = [step.anchor + 1 for step in steps], [step.drafted for step in steps]
            accepted_S = [step.accepted for step in steps]
            if kind == "fused":
                slot_S = [step.anchor + 1 - step.draft_start for step in steps]
        made = count + sum(accepted_S)
        decision.tokens = made / count
        if slot_S is not None:
            self._count(self._batch, decision.probe, start_S, drafted_S, accepted_S, slot_S)
            return
        # Read later, of several steps at once.
        self._steps.append((self._batch, decision.probe, start_S, drafted_S, accepted_S))
        self._made += made
        if self._made > self._enough:
            self._learn()

    def _learn(self) -> None:
        """Count what became of the drafts of the steps that were noted."""
        for step in self._steps:
            self._count(*step)
        self._steps.clear()
        self._made, self._enough = 0, min([self._of(kind).lacks for kind in self._batch.kinds], default=0.0)

    def _count(
        self, batch: StepBatch, probe: bool, start_S: list[int], drafted_S: list[int], accepted_S: list[int],
        slot_S: list[int] | None = None,
    ) -> None:  # fmt: skip
        """Count what became of the drafts of a step.

        Args:
            start_S: positions of the first drafts. slot_S: slots of these; None where all are 0, as in `two_pass`.
        """
        for s, sample in enumerate(batch.samples):
            # Whether this step was the sample's last.
            if sample.finish is not None and sample.anchor <= start_S[s] + accepted_S[s]:
                drafted_S, accepted_S = list(drafted_S), list(accepted_S)
                if sample.finish == "stop":
                    accepted_S[s] = sample.anchor - start_S[s]
                elif sample.finish == "length":  # the step was cut short, so its number of accepted drafts says nothing
                    drafted_S[s] = 0
        for kind, number in batch.kinds.items():
            slots, drafted, accepted = slot_S, drafted_S, accepted_S
            if number < len(batch.samples):
                own = [s for s, other in enumerate(batch.kind_S) if other == kind]
                slots = None if slots is None else [slots[s] for s in own]
                drafted, accepted = [drafted[s] for s in own], [accepted[s] for s in own]
            if self._of(kind).note_all(slots, drafted, accepted) and not probe:
                self._stands = 0

    def _chosen(self) -> Decision:
        """A choice among all schedules."""
        self._learn()
        self._settle()
        self._timed, self._compared = False, self._batch
        samples, drafting = self._batch.samples, self._batch.drafting
        context = sum([len(sample.tokens) for sample in samples]) / len(samples)
        remaining = sum([sample.remaining for sample in drafting]) / len(drafting)
        waiting = sum([sample.draft_count > 0 for sample in drafting])
        decision = self._best(context, remaining, 1 - waiting / len(drafting))
        steps = _PROBE_STEPS
        if not decision.probe:
            steps = int(min(max((remaining - _HORIZON) / decision.expected_tokens, 1), _PROBE_EVERY))
        self._stands = steps - 1
        return decision

    def _best(self, context: float, remaining: float, cold: float) -> Decision:
        seconds_N, means_N = self.costs.each(self.schedules, len(self._batch.samples), context), self._means()
        horizon, ending = min(remaining, _HORIZON), remaining <= _HORIZON
        total_N = [
            seconds * ((horizon + past * ending) / tokens + cold * turns * (1 - 1 / tokens))
            for seconds, (tokens, past), turns in zip(seconds_N, means_N, self._fused_N, strict=True)
        ]
        self._since += 1
        first = total_N.index(min(total_N))
        best = self._decision_of(self.schedules[first], context, seconds_N[first], means_N[first][0])
        unknown = best.schedule.kind == "ar" and not ending and not any([self._of(kind).tried for kind in self._batch.kinds])
        if self._since < _PROBE_EVERY and not unknown:
            return best
        ranked = sorted(range(len(total_N)), key=total_N.__getitem__)
        # `ar` teaches nothing about drafts.
        others = [n for n in ranked[1:] if self.schedules[n].kind != "ar"]
        near = [n for n in others if total_N[n] <= _NEAR * total_N[first]] or others[:1]
        # Every other time it is the kind of block that is not learnt from otherwise.
        unlike = next((n for n in near if self.schedules[n].kind != best.schedule.kind), near[0])
        n = unlike if self._turn % 2 else near[self._turn // 2 % len(near)]
        second = self._decision_of(self.schedules[n], context, seconds_N[n], means_N[n][0], probe=True)
        # Turning back to `fused` costs a step without drafts.
        back = 1.0 if best.schedule.kind == "fused" and second.schedule.kind != "fused" else 0.0
        rate = best.expected_tokens / best.expected_seconds
        excess = _PROBE_STEPS * (second.expected_seconds - 1 / rate)
        excess += back * best.expected_seconds * (1 - 1 / best.expected_tokens)
        if self._probed + excess > PROBE_SHARE * self._total and not unknown:
            return best
        self._since = 0
        self._turn += 1
        self._probed += max(excess, 0.0)
        if best.schedule.kind == "ar":  # nothing else is learnt from, and a policy in training moves
            for kind in self._batch.kinds:
                self._of(kind).fade()
        return second

    def _decision_of(self, schedule: Schedule, context: float, seconds: float, tokens: float, probe: bool = False) -> Decision:
        return Decision(schedule, len(self._batch.samples), context, seconds, tokens, probe)

    def _means(self) -> Means:
        """Tokens per sample of a step, and tokens past a given length, by schedule."""
        count, kinds = len(self._batch.samples), self._batch.kinds
        shares = [(number / count, self._of(kind).means(self.schedules)) for kind, number in kinds.items()]
        if len(shares) == 1 and shares[0][0] == 1:
            return shares[0][1]
        return [
            (1 + sum(share * (means[n][0] - 1) for share, means in shares), sum(share * means[n][1] for share, means in shares))
            for n in range(len(self.schedules))
        ]

    def _of(self, kind: Kind) -> Survival:
        known = self._survival.get(kind)
        if known is None:
            if len(self._survival) >= 64:
                self._survival.pop(next(iter(self._survival)))
            known = self._survival[kind] = Survival(self._block_size, self._prior)
        return known

    def _settle(self) -> None:
        """Count the times of those steps whose drafted positions are all committed."""
        while self._late and all(s.finish is not None or s.anchor >= end for s, end in self._late[0][1]):
            decision, _ = self._late.popleft()
            self.costs.note(decision.schedule, decision.batch, decision.context, decision.seconds)
        if len(self._late) > _LATE:
            self._late.popleft()
