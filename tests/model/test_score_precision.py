"""Attention scores are exact where they are large: log-probabilities of a policy with sharp attention, against float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from blockroll.kernels.attention import attend
from blockroll.model.checkpoint import load_policy
from blockroll.model.policy import Policy
from blockroll.model.scoring import score

Pairs = list[tuple[list[int], list[int]]]


@pytest.fixture(scope="module")
def sharp() -> tuple[Policy, Pairs]:
    """tiny-reasoner with scores of up to 100, and texts of random tokens."""
    policy = load_policy("tiny-reasoner", "float32")
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name.endswith("qk_norm.temp"):
                parameter.mul_(6)
    draw = np.random.default_rng(0)
    return policy.requires_grad_(), [(draw.integers(4, 270, 4).tolist(), draw.integers(4, 270, 60).tolist()) for _ in range(24)]


def errors(policy: Policy, pairs: Pairs, found: list[torch.Tensor]) -> torch.Tensor:
    """Differences from the log-probabilities of the same weights in float64, but for texts of which a row is routed elsewhere."""
    exact = copy.deepcopy(policy).double().requires_grad_(False)
    with torch.no_grad():
        true = score(exact, pairs)
    apart = [(ours.double() - torch.from_numpy(theirs)).abs() for ours, theirs in zip(found, true, strict=True)]
    return torch.cat([each for each in apart if each.max() < 1e-2])


def test_log_probabilities_of_engine_and_trainer_are_near_those_of_float64(sharp: tuple[Policy, Pairs]) -> None:
    """With float32 scores both lie twice as far from float64 as here."""
    policy, pairs = sharp
    engine = errors(policy, pairs, [torch.from_numpy(each) for each in score(policy, pairs)])
    trainer = errors(policy, pairs, [each.detach() for each in policy.logprobs(*map(list, zip(*pairs, strict=True)))])
    print(len(engine), engine.square().mean().sqrt(), engine.max(), len(trainer), trainer.square().mean().sqrt(), trainer.max())


def test_attention_rounds_large_scores_no_more_than_small_ones() -> None:
    """q . k of 100 between keys that lie close together; a float32 score would be off by 4e-6, and so would the result."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 64, 2, 32, generator=draw) for _ in range(3))
    q, k = (x / x.norm(dim=-1, keepdim=True) * 10 for x in (q, 0.1 * k + q))
    sees = torch.ones(1, 64, 64, dtype=torch.bool).tril()
    true = attend(q.double(), k.double(), v.double(), sees, 1.0)
    assert (attend(q, k, v, sees, 1.0) - true).abs().max() < 3e-7
