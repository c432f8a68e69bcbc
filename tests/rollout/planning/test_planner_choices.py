"""The planner's choices are those of a plain planner that keeps nothing from step to step."""

from __future__ import annotations

import random

import pytest
import torch
from plain_planner import PlainPlanner
from planner_doubles import BLOCK, SCHEDULES, Running, Traced, costs

from blockroll.rollout.engine import Engine
from blockroll.rollout.planning.planner import Planner, candidates
from blockroll.rollout.planning.step_costs import StepCosts
from blockroll.rollout.sample_log import UNSETTLED
from blockroll.rollout.types import RolloutRequest, SamplingParams


def history(seed, repeatable):
    """A planner and a plain one after the same steps of samples that come, go and run out of tokens."""
    draw = random.Random(seed)
    quick, plain = (made(costs(1.0, 0.01), SCHEDULES, BLOCK, repeatable=repeatable) for made in (Planner, PlainPlanner))
    kinds = [SamplingParams(s, t) for s, t in (("lossless", 0.7), ("lossless", 1.0), ("coupled", 0.7), ("ar", 1.0))]
    rate, most, samples = 0.8, 8, []
    for step in range(800):
        if step % 60 == 0:
            rate, most = draw.choice((0.0, 0.3, 0.6, 0.9)), draw.choice((1, 3, 8, 24))
        samples = [sample for sample in samples if sample.finish is None][:most]
        while len(samples) < most and (not samples or draw.random() < 0.7):
            request = RolloutRequest(f"{step}", (1,) * 8, draw.choice(kinds))
            samples.append(Running(request, [1] * draw.randrange(8, 90), draw.randrange(1, 150)))
        schedule = quick.choose(samples)
        assert schedule == plain.choose(samples), step
        for sample in samples:
            drafted, slot = min(sample.draft_count, schedule.drafts or 0), draw.randrange(1, 3)
            if schedule.kind == "two_pass":
                drafted, slot = schedule.drafts, 0
            if sample.request.params.sampler == "ar" or schedule.kind == "ar":
                drafted = 0
            accepted = next((k for k in range(drafted) if draw.random() >= rate), drafted)
            sample.trace.append(Traced(sample.anchor, drafted, accepted, sample.anchor + 1 - slot))
            count = min(accepted + 1, sample.remaining)
            sample.tokens += [1] * count
            sample.remaining -= count
            sample.finish = "length" if not sample.remaining else "stop" if draw.random() < 0.01 else None
            fused = schedule.kind == "fused" and sample.request.params.sampler != "ar"
            sample.draft_count = min(schedule.drafts, BLOCK - 2) if fused else 0
        seconds = None if draw.random() < 0.1 else quick.costs.seconds(schedule, len(samples), 64) * draw.choice((0.5, 1, 1.2, 4))
        for planner in (quick, plain):
            planner.observe(samples, seconds)
    return quick, plain


@pytest.mark.parametrize("repeatable", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_choices_are_those_of_a_plain_planner(seed, repeatable):
    """At every step of a random history: the schedule, whether it probes, and what was expected."""
    quick, plain = history(seed, repeatable)
    assert len({d.schedule for d in quick.log}) > 4 and any(d.probe for d in quick.log)
    for a, b in zip(quick.log, plain.log, strict=True):
        assert (a.schedule, a.batch, a.context, a.probe, a.seconds, a.tokens) == (
            b.schedule, b.batch, b.context, b.probe, b.seconds, b.tokens
        )  # fmt: skip
        assert a.expected_tokens == pytest.approx(b.expected_tokens, rel=1e-9)
        assert a.expected_seconds == pytest.approx(b.expected_seconds, rel=1e-9)


def test_a_log_that_is_read_between_steps_changes_no_choice(make_policy):
    """As where tokens are reported while they are made. Whether a step's record is still there depends on who has read a log."""
    policy = make_policy(torch.float32, seed=1, num_hidden_layers=1, layer_types=["hybrid"], max_position_embeddings=600)
    base = {"ar": 1.0, "two_pass": 1.05, "fused": 1.2}
    schedules = candidates(8)
    table = {s.label: {b: base[s.kind] + 0.02 * (s.drafts or 0) for b in (1, 64)} for s in schedules}
    params = SamplingParams(temperature=0.3, max_tokens=500, ignore_eos=True)
    asked = [RolloutRequest(f"{n}", (5, 6 + n), params, n, 1) for n in range(3)]
    found = []
    for share in (0.0, 0.05):
        engine = Engine(policy, max_batch=4, block_size=8)
        engine.planner = Planner(StepCosts(table, 64), schedules, 8, prior=0.4, repeatable=True)
        made, draw = [], random.Random(1)
        for request in asked:
            engine.add(request)
        while engine.has_work:
            made += engine.step()
            for sample in engine.scheduler.running:
                if draw.random() < share:
                    sample.log.settle()
        found.append(([each.schedule for each in engine.planner.log], {each.request_id: each.tokens for each in made}))
    assert sum(schedule.kind == "two_pass" for schedule in found[0][0]) > UNSETTLED
    assert found[0] == found[1]
