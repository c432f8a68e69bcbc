"""How tokens were made, told from the trace alone, against what the engine itself recorded."""

from __future__ import annotations

import numpy as np
import pytest

from blockroll import Engine, EngineConfig, RolloutRequest, SamplingParams, Trajectory
from blockroll.model.tasks import make_tasks
from blockroll.model.tokenizer import encode_prompt
from blockroll.rollout.evaluation.counts import acceptance_by_slot
from blockroll.rollout.inspection.origins import (
    ACCEPTED,
    BONUS,
    ENVIRONMENT,
    NO_LEVEL,
    RESAMPLED,
    SAMPLED,
    UNKNOWN,
    origins_of,
    steps_of,
)
from blockroll.rollout.schedule import Schedule

SCHEDULES = [Schedule("ar"), Schedule("two_pass"), Schedule("fused", levels=(0, 4, 8)), Schedule("fused", levels=(0,), block=4)]


def made(schedule: Schedule, sampler: str = "lossless") -> list[Trajectory]:
    engine = Engine("tiny-reasoner", EngineConfig(schedule, max_batch=16))
    params = SamplingParams(sampler=sampler, max_tokens=60)  # type: ignore[arg-type]
    for task in make_tasks("heldout", 12, 3):
        engine.add(RolloutRequest(task.id, tuple(encode_prompt(engine.policy.tokenizer, task.prompt)), params))
    found = []
    while engine.has_work:
        found += engine.step()
    return found


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.label)
def test_origins_are_what_the_engine_recorded(schedule: Schedule) -> None:
    samples = made(schedule)
    seen, slots = set(), [0, 0]
    for sample in samples:
        steps = steps_of(sample.trace, len(sample.prompt_tokens), len(sample.tokens))
        origin_N = origins_of(steps, len(sample.tokens))
        np.testing.assert_array_equal(origin_N == ACCEPTED, sample.from_draft)
        assert not np.isin(origin_N, (UNKNOWN, ENVIRONMENT)).any()
        assert steps.start[0] == 0 and int(steps.forwards.sum()) == sample.forwards
        ends = [*steps.start[1:], len(sample.tokens)]
        assert [min(a + 1, len(sample.tokens) - s) for s, a in zip(steps.start, steps.accepted)] == list(np.diff([0, *ends]))
        drafted = steps.drafted > 0
        if schedule.kind == "fused":
            assert set(steps.level[drafted].tolist()) <= set(schedule.levels)
            # A draft of slot i is i + 1 positions behind its level's anchor; the step before accepted as many of those.
            before = np.flatnonzero(drafted[1:])
            np.testing.assert_array_equal(steps.slot[1:][before], steps.accepted[before] - steps.level[1:][before] + 1)
        else:
            assert (steps.level == NO_LEVEL).all()
        slots[0] += int(np.minimum(steps.accepted + 1, steps.drafted)[drafted].sum())
        slots[1] += int(steps.accepted[drafted].sum())
        seen |= set(origin_N.tolist())
    expected = {SAMPLED} if schedule.kind == "ar" else {ACCEPTED, RESAMPLED, BONUS}
    assert expected <= seen
    # The conditional acceptance over all places is that of the evaluation.
    if schedule.kind != "ar":
        conditional, _ = acceptance_by_slot(samples)
        assert len(conditional) >= 3 and 0 < slots[1] / slots[0] < 1


def test_a_sample_that_ends_inside_its_drafts_counts_what_it_took() -> None:
    # Prompt of 2; a step without drafts, then 5 of 6 drafts accepted, of which the sample took 3.
    steps = steps_of([(1, 0, 0, -1, 0, 1), (2, 6, 5, 2, 8, 1)], 2, 4)
    assert steps.drafted.tolist() == [0, 3] and steps.accepted.tolist() == [0, 3] and steps.slot.tolist() == [0, 1]
    assert origins_of(steps, 4).tolist() == [SAMPLED, ACCEPTED, ACCEPTED, ACCEPTED]


def test_what_no_step_made_is_the_environments() -> None:
    # Two turns: tokens 3 and 4 (a tool's answer) lie between the steps.
    trace = [(1, 0, 0, -1, 0, 1), (2, 2, 1, 3, 8, 1), (6, 0, 0, -1, 0, 1)]
    assert origins_of(steps_of(trace, 2, 6), 6).tolist() == [SAMPLED, ACCEPTED, RESAMPLED, ENVIRONMENT, ENVIRONMENT, SAMPLED]
    assert origins_of(None, 3, [1, 0, 1]).tolist() == [UNKNOWN, ENVIRONMENT, UNKNOWN]


@pytest.mark.parametrize("sampler", ["ar", "coupled"])
def test_samples_of_one_seed_have_the_same_tokens_and_other_origins(sampler: str) -> None:
    """The trace is about how, not about what: `coupled` gives the tokens of `ar`, with drafts."""
    (one, two) = (sorted(made(s, sampler), key=lambda sample: sample.key) for s in (SCHEDULES[0], SCHEDULES[2]))
    assert [sample.tokens for sample in one] == [sample.tokens for sample in two]
    origins = [origins_of(steps_of(s.trace, len(s.prompt_tokens), len(s.tokens)), len(s.tokens)) for s in two]
    assert (np.concatenate(origins) == ACCEPTED).any() == (sampler == "coupled")
