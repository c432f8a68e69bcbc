"""Step times of an engine, measured at start-up and kept on disk.

Invariants:
- The engine's own steps are timed, on samples made for it, in the engine's cache. The engine is idle before and after, and its
  totals do not count these steps.
- Schedules and batches take turns, several times over. Of all times of one step the second shortest counts: other work of the
  machine only lengthens times, and a virtual machine's clock now and then leaves out part of a step. For the same reason no step
  counts as longer than a step with as many forward passes and no fewer rows or sequences.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch

from ...errors import StorageError
from ...model.policy import Policy
from ..schedule import Schedule
from ..sequence import Sample
from ..types import RolloutRequest, SamplingParams
from .planner import Planner, candidates
from .step_costs import StepCosts, clock, measured_on, rows, table_path

AR = Schedule("ar").within(2)
"""What an engine runs until its planner chooses."""
_PASSES = 2  # over all batches, so that a slow moment does not fall on one batch alone
_TURNS, _MOST_TURNS, _ENOUGH_SECONDS = 2, 5, 0.3  # of a pass, at one batch
_STEPS = 3  # of one schedule in a turn: the first one after another schedule finds its data further away
_SHORT, _LONG = 64, 1024  # prompt tokens of the two contexts, where the policy and the cache allow them

Begin = Callable[[RolloutRequest], None]
"""Queues a request."""
Run = Callable[[Schedule], list[Sample]]
"""Runs one step under this schedule, prefill included; returns the unfinished samples that decoded."""
End = Callable[[], object]
"""Gives up every sample."""


def calibrated_planner(
    policy: Policy, block_size: int, max_batch: int, pages: int, page_size: int, repeatable: bool,
    begin: Begin, run: Run, end: End,
) -> Planner:  # fmt: skip
    """A planner that knows an engine's step times. They are measured now where they are not known.

    Args:
        block_size: the engine's. pages, page_size: as in `step_costs`. repeatable: as in `Planner`.
    """
    schedules = candidates(block_size)
    costs = step_costs(policy, schedules, max_batch, pages, page_size, begin, run, end)
    # The prior is high where drafts were trained: a schedule that is tried is known after a few steps, so a hopeful guess
    # costs little and leaves nothing unknown for long.
    prior = 0.85 if policy.converted else 0.05
    return Planner(costs, schedules, block_size, prior=prior, repeatable=repeatable)


def batches_of(max_batch: int) -> tuple[int, ...]:
    """Batches that are measured: powers of four, and the largest."""
    sizes = [1]
    while sizes[-1] * 4 < max_batch:
        sizes.append(sizes[-1] * 4)
    return tuple(dict.fromkeys([*sizes, max_batch]))


def step_costs(
    policy: Policy, schedules: Sequence[Schedule], max_batch: int, pages: int, page_size: int,
    begin: Begin, run: Run, end: End,
) -> StepCosts:  # fmt: skip
    """The table for this machine and policy: from disk where it was measured before, else measured now and kept.

    Args:
        pages, page_size: the cache; batches it cannot hold without preemption are not measured.
    """
    bench = _Bench(policy, max(schedule.block or 1 for schedule in schedules), pages, page_size, begin, run, end)
    context = max(min(_SHORT, bench.longest(1) // 4), 1)
    batches = [batch for batch in batches_of(max_batch) if batch == 1 or bench.fits(batch, context)]
    # Tables of other batches were measured at another moment: a machine's speed changes, and lines of two speeds do not mix.
    what = measured_on(policy, page_size) | {"batches": batches}
    path = table_path(what, schedules)
    known = StepCosts.load(path)
    if known is not None and known.context == context and known.covers(schedules, batches):
        return known
    table: dict[str, dict[int, float]] = {schedule.label: {} for schedule in schedules}
    for batch in batches * _PASSES:
        for label, seconds in bench.time(schedules, batch, context).items():
            table[label][batch] = min(seconds, table[label].get(batch, seconds))
    costs = StepCosts(consistent(table, schedules), context)
    _add_context(costs, bench, schedules, batches[-1])
    try:
        costs.save(path, what)
    except StorageError as error:
        warnings.warn(f"step times are measured again next time: {error}", stacklevel=2)
    return costs


def consistent(table: dict[str, dict[int, float]], schedules: Sequence[Schedule]) -> dict[str, dict[int, float]]:
    """The table, each time at most that of any step with as many forwards and no fewer rows or sequences: schedule label to
    batch to seconds."""
    groups = [[s for s in schedules if (s.kind == "two_pass") == two] for two in (False, True)]
    return {
        schedule.label: {
            batch: min(
                seconds
                for other in group if rows(other) >= rows(schedule)
                for size, seconds in table[other.label].items() if size >= batch
            )
            for batch in table[schedule.label]
        }
        for group in groups
        for schedule in group
    }  # fmt: skip


def _add_context(costs: StepCosts, bench: _Bench, schedules: Sequence[Schedule], batch: int) -> None:
    """What a longer context costs: per position, and per row and position, from the narrowest and the widest step."""
    context = min(_LONG, bench.longest(batch) // 2)
    extra = context - costs.context
    if extra < costs.context or not bench.fits(batch, context):
        return
    narrow, wide = min(schedules, key=rows), max(schedules, key=rows)
    longer = bench.time([narrow, wide], batch, context)
    slope = {s.label: max(longer[s.label] - costs.seconds_at[s.label][batch], 0.0) / (extra * batch) for s in (narrow, wide)}
    if rows(wide) > rows(narrow):
        costs.per_row = max(slope[wide.label] - slope[narrow.label], 0.0) / (rows(wide) - rows(narrow))
    costs.per_position = max(slope[narrow.label] - rows(narrow) * costs.per_row, 0.0)


class _Bench:
    """Times steps of an idle engine."""

    def __init__(
        self, policy: Policy, block: int, pages: int, page_size: int, begin: Begin, run: Run, end: End
    ) -> None:
        self._policy, self._pages, self._page_size = policy, pages, page_size
        self._room = _STEPS * (block + 1)  # most tokens the steps of a turn commit
        self._begin, self._run, self._end = begin, run, end

    def longest(self, batch: int) -> int:
        """Positions each sample may take."""
        return min(self._policy.config.max_position_embeddings, self._pages // batch * self._page_size)

    def fits(self, batch: int, context: int) -> bool:
        """Whether `batch` samples of this context can take full steps without preemption."""
        return self.longest(batch) >= context + self._room

    def time(self, schedules: Sequence[Schedule], batch: int, context: int) -> dict[str, float]:
        """Second shortest seconds of a step at this batch, by label."""
        taken: dict[str, list[float]] = {schedule.label: [] for schedule in schedules}
        room = self.longest(batch) - context
        params = SamplingParams("lossless", max_tokens=room, ignore_eos=True)
        draw = torch.Generator().manual_seed(context)
        prompt = torch.randint(self._policy.config.vocab_size, (context,), generator=draw).tolist()
        request = RolloutRequest("calibration", tuple(prompt), params, samples=batch)
        left, now = 0, clock(self._policy)
        began = now()
        for number in range(_MOST_TURNS):
            if number >= _TURNS and now() - began > _ENOUGH_SECONDS:
                break
            for schedule in schedules:
                if left < self._room:
                    left = self._restart(request, batch)
                # A schedule's first step has no drafts of its own to verify.
                for turn in range(_STEPS):
                    start = now()
                    decoded = self._run(schedule)
                    seconds = now() - start
                    left = min((sample.remaining for sample in decoded), default=0)
                    if turn or schedule.kind != "fused":
                        taken[schedule.label].append(seconds)
        self._end()
        return {label: sorted(seconds)[1] for label, seconds in taken.items()}

    def _restart(self, request: RolloutRequest, batch: int) -> int:
        """Prefills the samples; the tokens each may still make."""
        self._end()
        self._begin(request)
        while True:
            decoded = self._run(AR)
            if len(decoded) == batch:
                return min(sample.remaining for sample in decoded)
