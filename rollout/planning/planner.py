"""The planner: while decoding it chooses the schedule that makes the next tokens in the least time.

For the next G tokens of each sample a schedule needs

    seconds(schedule, batch, context) * ((G + past) / tokens + cold * (1 - 1 / tokens))

where `tokens` is the schedule's expected tokens per step (`survival`). `past` counts the tokens that the last step makes beyond
a sample's end; it is 0 where samples do not end within G tokens. `cold`, for `fused`, is the share of samples that have no
drafts waiting, because the last step proposed none. So `cold` is the price of changing to `fused`; changing away drops the
waiting drafts. Now and then the planner probes: it runs two steps of a schedule that is nearly as good, in order to learn. Probes
take at most `PROBE_SHARE` of the time, counted as if all their drafts were rejected.

A choice stands for some steps, because comparing schedules takes the host's time, and little changes from step to step. Schedules
are compared again when the numbers of samples change, when acceptance rates were estimated anew, when samples come near their
ends, and after `_PROBE_EVERY` steps. The second step of each choice is timed, of probes as of others: the first one also compares
schedules, and finds its data further away where another schedule ran before it.

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
from itertools import repeat

from ..schedule import Schedule
from ..sequence import Sample
from ..types import SamplingParams
from .step_costs import StepCosts
from .survival import Survival

PROBE_SHARE = 0.015
_PROBE_EVERY = 24  # steps between two probes, at least; and the most that a choice stands for
_PROBE_STEPS = 2  # the first step is not timed, and that of `fused` has no drafts to verify
_NEAR = 1.5  # times the best one's seconds: what is probed in turn
_HORIZON = 32  # tokens looked ahead: a batch seldom stays as it is for longer
_LOG = 4096
_LATE = 64  # step times held back at once; where a sample waits for long, the oldest are given up
_AR = Schedule("ar").within(2)

Kind = tuple[str, float, bool]
"""Samples of one kind share acceptance rates: sampler, temperature, whether a cut-off (top-k, top-p, min-p) is active."""


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


@dataclass(frozen=True, slots=True)
class _Batch:
    """S samples of a step, and what stays the same while they run.

    Attributes:
        drafting: those whose sampler takes drafts. kinds: how many of these are of each kind. kind_S: the kind of every sample.
    """

    samples: tuple[Sample, ...]
    drafting: list[Sample]
    kinds: dict[Kind, int]
    kind_S: list[Kind]

    @classmethod
    def of(cls, samples: Sequence[Sample], before: _Batch | None = None) -> _Batch:
        """The samples of a step; `before`: another batch, some of whose samples may be the same."""
        known = {} if before is None else dict(zip(before.samples, before.kind_S, strict=True))
        kind_S = [known.get(sample) or _kind(sample.request.params) for sample in samples]
        kinds = {kind: kind_S.count(kind) for kind in dict.fromkeys(kind_S) if kind[0] != "ar"}
        drafting = [sample for sample, kind in zip(samples, kind_S, strict=True) if kind[0] != "ar"]
        return cls(tuple(samples), drafting, kinds, kind_S)


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
        self._survival: dict[Kind, Survival] = {}
        self._decision: Decision | None = None
        self._batch = _Batch.of(())
        self._late: deque[tuple[Decision, list[tuple[Sample, int]]]] = deque()
        self._total = self._probed = 0.0
        self._since = self._turn = self._stands = 0
        self._first = self._timed = False

    def choose(self, decoding: Sequence[Sample]) -> Schedule:
        """The schedule of the step that decodes these samples."""
        if len(decoding) != len(self._batch.samples) or self._batch.samples != tuple(decoding):
            before = self._batch
            self._batch = _Batch.of(decoding, before)
            probes = self._decision is not None and self._decision.probe
            changed = self._batch.kinds != before.kinds or len(before.samples) != len(decoding)
            if changed and not (probes and self._batch.drafting):  # half a probe would have taught nothing
                self._stands = 0
        decision, self._first = self._decision, not self._stands
        if self._stands and decision is not None:
            self._stands -= 1
            self._since += 1
            decision = self._decision_of(
                decision.schedule, decision.context, decision.expected_seconds, decision.expected_tokens, decision.probe
            )
        elif self._batch.drafting:
            decision = self._chosen(decoding)
        else:
            decision = None
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
        self._learn(decoding, decision)
        if seconds is None:
            return
        decision.seconds = seconds
        if not (self._first or self._timed or self.repeatable):
            self._timed = True
            ends = [(sample, sample.anchor + self._block_size) for sample in decoding if sample.finish is None]
            self._late.append((decision, ends))

    def _learn(self, decoding: Sequence[Sample], decision: Decision) -> None:
        """Count what became of the drafts of a step, and its tokens."""
        count, kind = len(decoding), decision.schedule.kind
        if kind == "ar":
            decision.tokens = 1.0
            return
        # The record of a step serves all its samples; in `two_pass`, all drafts begin in slot 0.
        record = decoding[0].log.record if kind == "two_pass" else None
        if record is not None:
            accepted_S, outcomes = record.accepted, list(zip(repeat(0, count), record.drafted, record.accepted))
        else:
            steps = [sample.last_step for sample in decoding]
            accepted_S = [step.accepted for step in steps]
            outcomes = [(step.anchor + 1 - step.draft_start, step.drafted, step.accepted) for step in steps]
        for s, sample in enumerate(decoding):
            if sample.finish is not None:
                slot, drafted, accepted = outcomes[s]
                # A step that hit `max_tokens` was cut short, so its number of accepted drafts says nothing.
                drafted = drafted if sample.finish == "stop" else 0
                outcomes[s] = slot, drafted, min(accepted, sample.anchor - sample.last_step.anchor - 1)
        for its_kind, number in self._batch.kinds.items():
            own = outcomes
            if number < count:
                own = [each for each, other in zip(outcomes, self._batch.kind_S, strict=True) if other == its_kind]
            if self._of(its_kind).note_all(own) and not decision.probe:
                self._stands = 0
        decision.tokens = 1 + sum(accepted_S) / count

    def _chosen(self, decoding: Sequence[Sample]) -> Decision:
        """A choice among all schedules."""
        self._settle()
        self._timed = False
        drafting = self._batch.drafting
        context = sum([len(sample.tokens) for sample in decoding]) / len(decoding)
        remaining = sum([sample.remaining for sample in drafting]) / len(drafting)
        waiting = sum([sample.draft_count > 0 for sample in drafting])
        decision = self._best(context, remaining, 1 - waiting / len(drafting))
        steps = _PROBE_STEPS
        if not decision.probe:
            steps = int(min(max((remaining - _HORIZON) / decision.expected_tokens, 1), _PROBE_EVERY))
        self._stands = steps - 1
        return decision

    def _best(self, context: float, remaining: float, cold: float) -> Decision:
        seconds_N, tokens_N, past_N = self._expected(context, remaining <= _HORIZON)
        horizon, total_N = min(remaining, _HORIZON), list[float]()
        for schedule, seconds, tokens, past in zip(self.schedules, seconds_N, tokens_N, past_N, strict=True):
            steps = (horizon + past) / tokens
            if schedule.kind == "fused":
                steps += cold * (1 - 1 / tokens)
            total_N.append(seconds * steps)
        self._since += 1
        first = min(range(len(total_N)), key=total_N.__getitem__)
        best = self._decision_of(self.schedules[first], context, seconds_N[first], tokens_N[first])
        if self._since < _PROBE_EVERY:
            return best
        ranked = sorted(range(len(total_N)), key=total_N.__getitem__)
        # `ar` teaches nothing about drafts.
        others = [n for n in ranked[1:] if self.schedules[n].kind != "ar"]
        near = [n for n in others if total_N[n] <= _NEAR * total_N[first]] or others[:1]
        # Every other time it is the kind of block that is not learnt from otherwise.
        unlike = next((n for n in near if self.schedules[n].kind != best.schedule.kind), near[0])
        n = unlike if self._turn % 2 else near[self._turn // 2 % len(near)]
        second = self._decision_of(self.schedules[n], context, seconds_N[n], tokens_N[n], probe=True)
        # Turning back to `fused` costs a step without drafts.
        back = 1.0 if best.schedule.kind == "fused" and second.schedule.kind != "fused" else 0.0
        rate = best.expected_tokens / best.expected_seconds
        excess = _PROBE_STEPS * (second.expected_seconds - 1 / rate)
        excess += back * best.expected_seconds * (1 - 1 / best.expected_tokens)
        if self._probed + excess > PROBE_SHARE * self._total:
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

    def _expected(self, context: float, ending: bool) -> tuple[list[float], list[float], list[float]]:
        """Seconds of a step, tokens per sample, and where samples are `ending` the tokens past their end, by schedule."""
        batch, schedules = len(self._batch.samples), self.schedules
        tokens_N, past_N = [float(batch)] * len(schedules), [0.0] * len(schedules)
        for kind, count in self._batch.kinds.items():
            means = self._of(kind).means(schedules)
            tokens_N = [known + count * (tokens - 1.0) for known, (tokens, _) in zip(tokens_N, means, strict=True)]
            if ending:
                past_N = [known + count * past for known, (_, past) in zip(past_N, means, strict=True)]
        seconds_N = self.costs.each(schedules, batch, context)
        return seconds_N, [tokens / batch for tokens in tokens_N], [past / batch for past in past_N]

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


def _kind(params: SamplingParams) -> Kind:
    return params.sampler, params.temperature, params.top_k > 0 or params.top_p < 1 or params.min_p > 0
