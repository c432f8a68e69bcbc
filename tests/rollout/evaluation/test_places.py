"""Acceptance at given places is what a step that begins there accepts."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from blockroll.model.checkpoint import load_policy
from blockroll.model.tasks import make_tasks
from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.evaluation import evaluate, places
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.steps import runner
from blockroll.rollout.types import RolloutRequest, SamplingParams, Trajectory

PROMPTS = [(5, 6, 4), (3,)]


def sampled(policy, sampler, schedule, temperature, samples, prompts=PROMPTS):
    # Nine tokens, because a step drafts no more than it may still commit.
    params = SamplingParams(sampler, temperature, max_tokens=9, ignore_eos=True)
    engine = Engine(policy, EngineConfig(schedule=schedule, block_size=8, max_batch=200, pages=300))
    return engine.rollout([RolloutRequest(str(i), prompt, params, i, samples) for i, prompt in enumerate(prompts)])


@pytest.fixture
def all_from_q(monkeypatch):
    """`two_pass` draws its first draft from q too."""
    draft = runner.draft
    monkeypatch.setattr(runner, "draft", lambda *arguments: draft(*arguments[:7]))


def with_markov(policy):
    policy.add_markov(3, torch.Generator().manual_seed(0))
    policy.requires_grad_(False).markov.next.weight.normal_(generator=torch.Generator().manual_seed(1))
    return policy


def test_a_lossless_step_that_begins_there_accepts_as_much(make_policy, monkeypatch, all_from_q) -> None:
    policy, temperature = with_markov(make_policy(vocab_size=8, sharpness=0.3)), 0.7
    monkeypatch.setattr(places, "_places", lambda sample, most, seed: [len(sample.prompt_tokens)])
    texts = sampled(policy, "ar", Schedule("ar"), temperature, 200)
    expected = places.acceptance_at_places(policy, texts, [8], temperature)[8]
    assert len(expected) == 8
    first = [sample.trace[0].accepted for sample in sampled(policy, "lossless", Schedule("two_pass"), temperature, 200)]
    for slot in range(2):
        reached = [accepted for accepted in first if accepted >= slot]
        share = np.mean([accepted > slot for accepted in reached])
        # Both are estimates from as many samples, though the former of them is the smoother one.
        assert abs(expected[slot][0] - share) < 4 * (2 * share * (1 - share) / len(reached)) ** 0.5


def test_block_sizes_share_their_places(make_policy) -> None:
    """What a slot says of a block size does not depend on which other sizes are asked for."""
    policy = make_policy(vocab_size=8, sharpness=0.3)
    texts = sampled(policy, "ar", Schedule("ar"), 1.0, 3)
    both = places.acceptance_at_places(policy, texts, [2, 8], 1.0, places=2)
    assert list(map(len, both.values())) == [2, 8]
    for size in (2, 8):
        alone = places.acceptance_at_places(policy, texts, [size], 1.0, places=2)[size]
        assert np.array(alone) == pytest.approx(np.array(both[size]), rel=1e-9)
    assert places.acceptance_at_places(policy, texts, [8], 1.0, places=2, seed=1)[8] != both[8]


@pytest.mark.parametrize("markov", [False, True])
def test_greedy_counts_equal_tokens(make_policy, monkeypatch, all_from_q, markov: bool) -> None:
    policy = make_policy(vocab_size=8, sharpness=0.3)
    if markov:
        with_markov(policy)
    monkeypatch.setattr(places, "_places", lambda sample, most, seed: [len(sample.prompt_tokens)])
    prompts = list(product(range(3, 8), repeat=2))
    texts = sampled(policy, "ar", Schedule("ar"), 0.0, 1, prompts)
    accepted = [s.trace[0].accepted for s in sampled(policy, "lossless", Schedule("two_pass"), 0.0, 1, prompts)]
    assert max(accepted) > 0
    for slot, (value, _) in enumerate(places.acceptance_at_places(policy, texts, [8], 0.0)[8]):
        reached = [a for a in accepted if a >= slot]
        assert value == pytest.approx(np.mean([a > slot for a in reached]) if reached else 0.0)


@pytest.mark.slow
def test_no_slot_of_the_shipped_policy_falls_off_a_cliff() -> None:
    policy = load_policy("tiny-reasoner")
    texts: list[Trajectory] = []
    evaluate(policy, make_tasks("heldout", 300), sampler="ar", schedule=Schedule("ar"), batch=32, on_finish=texts.append)
    slots = places.acceptance_at_places(policy, texts, [4, 8, 16, 32], 1.0)
    for size, most in ((8, 0.05), (4, 0.15), (32, 0.15)):
        for (own, _), (usual, _) in zip(slots[size], slots[16], strict=False):
            assert abs(own / usual - 1) < most
