"""A weight version in the middle of work: what samples keep, what they prefill again, and which samples end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blockroll.model.checkpoint import load_policy
from blockroll.model.scoring import score
from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.types import RolloutRequest, SamplingParams


def changed(policy):
    """Other weights for the policy."""
    noise = torch.Generator().manual_seed(3)
    return {name: x + 0.02 * torch.randn(x.shape, generator=noise) if x.ndim == 2 else x.clone()
            for name, x in policy.state_dict().items() if name != "lm_head.weight"}  # fmt: skip


def group(name, length, seed=0, samples=4, **params):
    tokens = tuple(np.random.default_rng(seed).integers(5, 60, length).tolist())
    return RolloutRequest(name, tokens, SamplingParams("coupled", max_tokens=12, ignore_eos=True, **params), seed, samples)


def rest(engine):
    done = []
    while engine.has_work:
        done += engine.step()
    return done


@pytest.mark.parametrize("schedule", ["ar", "two_pass", "fused"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 9])
def test_keep_gives_samples_of_one_version_the_bits_of_scoring(schedule, steps):
    """Also where the version comes in the middle of a prompt that samples share."""
    policy = load_policy("tiny-reasoner-terse")
    engine = Engine(policy, EngineConfig(Schedule(schedule), max_batch=3, prefill_rows=16))
    for request in (group("long", 60), group("short", 9, 1), group("later", 40, 2)):
        engine.add(request)
    done = [sample for _ in range(steps) for sample in engine.step()]
    engine.load_weights(changed(policy), 1, "keep")
    done += rest(engine)
    assert len(done) == 12
    new = [sample for sample in done if set(sample.versions.tolist()) == {1}]
    assert len(new) >= 6
    for sample, scores in zip(new, score(policy, [(s.prompt_tokens, s.tokens) for s in new]), strict=True):
        assert np.array_equal(sample.logprobs, scores), (sample.request_id, sample.sample)
