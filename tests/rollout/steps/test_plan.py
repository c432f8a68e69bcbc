"""Plans of steps: the rows of every sequence, which of them hold drafts, and where the next drafts come from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blockroll.model.layout import DecodeRows
from blockroll.rollout.cache import BlockTable
from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.sampling.drafts import Drafts
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.sequence import Sample, ScheduledSample, SchedulerOutput
from blockroll.rollout.steps.plan import Proposals, select_on_device
from blockroll.rollout.steps.runner import SamplerVerifier, plan_builder
from blockroll.rollout.types import RolloutRequest, SamplingParams

MASK = 99


def make_sample(name, waiting=0, sampler="lossless", left=20, cached=2):
    """Prompt 5, 6, 7; the anchor stands at position 2; `waiting` drafts from a block at position 4."""
    request = RolloutRequest(name, (5, 6, 7), SamplingParams(sampler))
    sample = Sample(request, 0, 3 + left, [5, 6, 7], frozenset(), 0, block_table=BlockTable(0, length=cached))
    if waiting:
        sample.keep_drafts(Drafts.none(1), 0, waiting, 4, 8)
    return sample


def planned(schedule, *scheduled):
    return plan_builder(schedule.within(8), MASK).plan(SchedulerOutput.of(list(scheduled)))


def test_fused_verifies_what_waits_and_proposes_the_levels_in_reach():
    plan = planned(
        Schedule("fused", drafts=4, levels=(0, 2)), ScheduledSample(make_sample("four", waiting=6), 0, True),
        ScheduledSample(make_sample("one", waiting=1), 0, True), ScheduledSample(make_sample("none"), 0, True),
        ScheduledSample(make_sample("ar", sampler="ar"), 0, True),
        ScheduledSample(make_sample("end", waiting=6, left=1), 0, True),
        ScheduledSample(make_sample("prompt", cached=0), 2, True),
        ScheduledSample(make_sample("part", cached=0), 1, False),
    )  # fmt: skip
    assert plan.forward.rows() == [
        DecodeRows([7, MASK, MASK, MASK, MASK], 2, (1, 3), 8), DecodeRows([7, MASK], 2, (1,), 8), DecodeRows([7], 2, (1,), 8),
        DecodeRows([7], 2, (), 0), DecodeRows([7], 2, (), 0), DecodeRows([5, 6, 7], 0, (3,), 8), DecodeRows([5], 0, (), 0),
    ]  # fmt: skip
    assert plan.count_D.tolist() == [4, 1, 0, 0, 0, 0] and plan.forward.width == 5 and plan.verify_forward is None
    assert plan.block_start_D == [4, 4, -1, -1, -1, -1] and plan.block_length_D == [8, 8, 0, 0, 0, 0]
    assert plan.proposals.proposes_D.tolist() == [True, True, True, False, False, True] and plan.forwards == 1


def test_two_pass_drafts_a_whole_block_and_verifies_what_may_be_committed():
    plan = planned(
        Schedule("two_pass", 3), ScheduledSample(make_sample("all", waiting=2), 0, True),
        ScheduledSample(make_sample("ar", sampler="ar"), 0, True), ScheduledSample(make_sample("end", left=2), 0, True),
    )  # fmt: skip
    assert plan.forward.rows() == [DecodeRows([7], 2, (1,), 3), DecodeRows([7], 2, (), 0), DecodeRows([7], 2, (1,), 3)]
    assert plan.verify_forward.rows() == [DecodeRows([MASK] * 3, 3, (), 0), DecodeRows([MASK], 3, (), 0)]
    assert plan.count_D.tolist() == [3, 0, 1] and plan.verify_D.tolist() == [0, 2] and plan.proposals is None
    assert plan.block_start_D == [3, -1, 3] and plan.block_length_D == [3, 0, 3] and plan.forwards == 2


def test_ar_runs_anchors_alone():
    plan = planned(Schedule("ar"), ScheduledSample(make_sample("waits", waiting=2), 0, True))
    assert plan.forward.rows() == [DecodeRows([7], 2, (), 0)]
    assert (plan.verify_forward, plan.proposals, plan.forward.width, plan.count_D.tolist()) == (None, None, 1, [0])


def test_the_next_drafts_follow_the_sampled_token():
    """Proposals of 8 rows for levels 0 and 2, at most 4 drafts."""
    left = np.array([20, 20, 20, 20, 20, 20, 4])
    proposals = Proposals(np.array([0, 2]), 8, 4, np.array([True] * 5 + [False, True]), left)
    row_D, count_D, level_D = proposals.select(np.array([0, 1, 2, 3, 4, 2, 2]))
    assert level_D.tolist() == [0, 0, 2, 2, 2, 2, 2]
    assert row_D.tolist() == [1, 2, 9, 10, 11, 9, 9]
    assert count_D.tolist() == [4, 4, 4, 4, 4, 0, 0]
    few = Proposals(np.array([0]), 8, 7, np.array([True]), np.array([20])).select(np.array([5]))
    assert (few.mask_row_D.tolist(), few.count_D.tolist()) == ([6], [2])


def test_a_verifier_may_be_put_in_place(make_policy):
    """It hears the plan, and its verdict is what the samples commit."""
    policy, seen = make_policy(torch.float32, sharpness=0.6), []

    class RejectAll(SamplerVerifier):
        def prepare(self, plan):
            seen.append(plan.count_D.sum())

        def __call__(self, *arguments):
            verdict = super().__call__(*arguments)
            verdict.accepted_S.zero_()
            verdict.token_SR.clamp_(min=0)
            return verdict

    engine = Engine(policy, EngineConfig(Schedule("fused", levels=(0,)), block_size=4))
    engine.runner.verifier = RejectAll()
    params = SamplingParams("coupled", max_tokens=7, ignore_eos=True, routed_experts=True)
    (sample,) = engine.rollout([RolloutRequest("r", (5, 6), params)])
    assert len(seen) == sample.forwards == 7 and sum(seen) > 0 and not sample.from_draft.any()
    assert engine.runner.wait_seconds > 0


@pytest.mark.parametrize(("levels", "block", "drafts"), [((0,), 4, 3), ((0, 2), 4, 3), ((0, 1, 5), 8, 6)])
def test_the_device_selects_as_the_host_does(levels, block, drafts):
    accepted, remaining, proposes = (each.ravel() for each in np.meshgrid(np.arange(drafts + 1), np.arange(12), [False, True]))
    proposals = Proposals(np.array(levels), block, drafts, proposes, remaining)
    row, count, _ = proposals.select(accepted)
    there = [torch.from_numpy(each) for each in (np.array(levels), proposes, remaining, accepted)]
    got_row, got_count = select_on_device(there[0], block, drafts, *there[1:])
    assert np.array_equal(got_row.numpy(), row) and np.array_equal(got_count.numpy(), count)
