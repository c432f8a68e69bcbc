"""The reference trainer's loss, advantages and optimiser steps, against what the formulas say."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch

from blockroll.model.conversion.config import Architecture, ConversionConfig, Stage
from blockroll.model.conversion.train import new_policy
from blockroll.model.scoring import score
from blockroll.rollout.types import Trajectory
from blockroll.trainer_bridge.trainers.grpo.config import GrpoConfig, Loss
from blockroll.trainer_bridge.trainers.grpo.learner import Learner, Progress
from blockroll.trainer_bridge.trainers.grpo.loss import Update, draft_weight, mask_blocks, pack_loss
from blockroll.trainer_bridge.trainers.grpo.rewards import LearningSample, advantages, differing


@pytest.fixture
def policy():
    shape = Architecture(hidden_size=32, layers=2, heads=4, head_dim=8, experts=2, expert_size=32, router_size=8)
    stage = Stage(name="none", kind="ar", tokens=1)
    made = new_policy(ConversionConfig(output="unused", architecture=shape, stages=(stage,)))
    made.converted = True
    return made


def sample(policy, tokens, advantage, prompt=(1, 20, 30), reference=None) -> LearningSample:
    logprobs = score(policy, [(prompt, tokens)])[0]
    n = len(tokens)
    versions, drafted = np.zeros(n, np.int32), np.zeros(n, bool)
    return LearningSample(Trajectory("r", 0, prompt, list(tokens), logprobs, logprobs, versions, drafted, "stop", n),
                          advantage, reference)


def plain_loss(policy, samples, **options):
    """The loss of one pack that is the whole update, without a draft loss."""
    update = Update(len(samples), sum(len(s.trajectory.tokens) for s in samples))
    return pack_loss(policy, samples, [[] for _ in samples], update, 1.0, Loss(draft_weight=0.0, **options))


def test_advantages_of_a_group_with_and_without_its_deviation():
    rewards = np.array([[0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    std = 3**0.5 / 4
    assert advantages(rewards) == pytest.approx(np.array([[-0.25, 0.75, -0.25, -0.25], [0] * 4]) / std, abs=1e-3)
    assert advantages(rewards, "none") == pytest.approx(np.array([[-0.25, 0.75, -0.25, -0.25], [0] * 4]))
    assert differing(rewards).tolist() == [True, False]


def test_loss_on_policy_is_the_mean_advantage_and_pushes_along_it(policy):
    one = sample(policy, [40, 41, 42, 43, 2], 0.7)
    value, figures = plain_loss(policy, [one])
    assert value.item() == pytest.approx(-0.7, abs=1e-4)
    assert figures.kl == pytest.approx(0.0, abs=1e-4)
    gradient = torch.autograd.grad(value, policy.model.norm.weight)[0]
    with torch.no_grad():
        policy.model.norm.weight -= 0.01 * gradient / gradient.norm()
    trajectory = one.trajectory
    assert score(policy, [(trajectory.prompt_tokens, trajectory.tokens)])[0].sum() > trajectory.logprobs.sum()


def test_a_short_sample_weighs_as_much_as_a_long_one_by_sequence_and_less_by_token(policy):
    samples = [sample(policy, [40, 2], 1.0), sample(policy, list(range(40, 58)), -1.0)]
    assert plain_loss(policy, samples, aggregation="token")[0].item() == pytest.approx(-(2 - 18) / 20, abs=1e-4)
    assert plain_loss(policy, samples, aggregation="sequence")[0].item() == pytest.approx(0.0, abs=1e-4)


def test_ratio_is_clipped_and_behaviour_corrected(policy):
    one = sample(policy, [40, 41, 2], 1.0)
    one.trajectory.logprobs = one.trajectory.logprobs - 1.0  # ratio e: above the clip
    one.trajectory.behavior_logprobs = one.trajectory.logprobs - 10.0  # weight capped
    value, figures = plain_loss(policy, [one], clip_high=0.28, importance_cap=2.0)
    assert value.item() == pytest.approx(-2.0 * 1.28, abs=1e-4)
    assert figures.clipped == 3
    assert figures.ratio / 3 == pytest.approx(np.e, rel=1e-3)


def test_kl_to_the_starting_policy_by_its_formula(policy):
    logprobs = sample(policy, [40, 41, 2], 0.0).trajectory.logprobs
    difference = np.array([0.5, 0.0, -1.0], np.float32)  # log r
    one = sample(policy, [40, 41, 2], 0.0, reference=logprobs + difference)
    value, _ = plain_loss(policy, [one], kl_weight=0.3)
    assert value.item() == pytest.approx(0.3 * float((np.exp(difference) - 1 - difference).mean()), abs=1e-4)


def test_draft_loss_trains_the_draft_and_leaves_p_its_target(policy):
    one = sample(policy, list(range(40, 70)), 0.0)
    blocks = [mask_blocks(len(one.trajectory.prompt_tokens), one.rows, policy.block_size, random.Random(0))]
    update = Update(1, 30, draft_weight([one], blocks, 0.95))
    value, figures = pack_loss(policy, [one], blocks, update, 1.0, Loss(draft_weight=1.0))
    gradient = torch.autograd.grad(value, policy.model.embed_tokens.weight)[0]
    assert gradient[policy.mask_token_id].abs().sum() > 0
    assert 0.0 < figures.overlap <= 1.0


def config(loss=None, **optimizer) -> GrpoConfig:
    optimizer = {"pack_rows": 64, "updates_per_step": 2, **optimizer}
    return GrpoConfig(output="unused", steps=4, loss=loss or {}, optimizer=optimizer)


def many(policy) -> list[LearningSample]:
    draw = random.Random(3)
    return [sample(policy, [draw.randrange(20, 200) for _ in range(draw.randint(3, 30))], draw.gauss(0, 1))
            for _ in range(12)]  # fmt: skip


def test_steps_repeat_to_the_bit_and_threads_change_nothing_but_rounding(policy):
    samples = many(policy)
    trained = []
    for threads in (2, 2, 1):
        learner = Learner(copy.deepcopy(policy), config(threads=threads))
        figures = [learner.step(step, samples) for step in (1, 2)]
        trained.append((torch.cat([p.detach().flatten() for p in learner.policy.parameters()]), figures))
    assert torch.equal(trained[0][0], trained[1][0]) and trained[0][1] == trained[1][1]
    # AdamW's first steps have the size of the learning rate whatever the gradient's, so rounding shows where it is near zero.
    assert (trained[0][0] - trained[2][0]).abs().mean() < 1e-7
    assert trained[0][1][0].kl == pytest.approx(trained[2][1][0].kl, abs=1e-5)


@pytest.mark.parametrize("draft", [{}, {"slots": "reached"}, {"slots": "accepted", "kl": 1.0}])
def test_gradients_do_not_depend_on_how_samples_are_packed(policy, draft):
    samples = many(policy)
    gradients = []
    for rows in (64, 4096):
        learner = Learner(copy.deepcopy(policy), config({"draft": draft}, pack_rows=rows, threads=1))
        update, packs = learner._packs(samples, random.Random(0))
        learner._gradients(update, packs)
        gradients.append(torch.cat([p.grad.flatten() for p in learner.policy.parameters() if p.grad is not None]))
    assert len(gradients[0]) == len(gradients[1])
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[0].norm()


def test_nothing_to_learn_from_changes_nothing(policy):
    learner = Learner(policy, config())
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    assert learner.step(1, []) == Progress()
    assert all(torch.equal(before[name], p) for name, p in policy.named_parameters())
