"""A Markov head: drafts that know the token before them, and samplers that stay what they promise."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_cases import CUTS, cut_requests, prompt, tokens_of_ar
from enumeration import BROKEN, GOOD, TEMPERATURE, Enumeration, p_value, small_policy

from blockroll.model.layout import CLEAN, causal, diffusion
from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.sampling import processing
from blockroll.rollout.sampling import sampler as sampler_module
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.types import RolloutRequest, SamplingParams

FUSED, TWO_PASS = Schedule("fused", levels=(0, 1)), Schedule("two_pass")


def with_markov(policy, rank=4, strength=1.0):
    policy.add_markov(rank, torch.Generator().manual_seed(1))
    policy.markov.next.weight.data.normal_(0, strength, generator=torch.Generator().manual_seed(2))
    return policy.requires_grad_(False)


@pytest.fixture(scope="module")
def small(make_policy):
    return Enumeration(with_markov(small_policy(make_policy)))


@pytest.fixture(scope="module")
def policy(make_policy):
    """float64: a test of tokens must not depend on the order of a sum."""
    return with_markov(make_policy(sharpness=0.6), strength=0.5)


COUNTS = pytest.mark.parametrize("count", [8192, pytest.param(200_000, marks=pytest.mark.slow)])
PARAMS = {sampler: SamplingParams(sampler, temperature=TEMPERATURE) for sampler in ("lossless", "mixed")}


@pytest.mark.parametrize("schedule", [FUSED, TWO_PASS], ids=lambda s: s.kind)
@pytest.mark.parametrize("sampler", PARAMS)
@COUNTS
def test_lossless_is_p_and_mixed_its_own_distribution(small, sampler, schedule, count):
    outcomes = small.sampled(PARAMS[sampler], schedule, count)
    assert p_value(outcomes, small.exact(PARAMS[sampler], schedule)) > GOOD
    if sampler == "mixed":
        assert p_value(outcomes, small.exact(PARAMS["lossless"], schedule)) < BROKEN


def test_the_check_sees_a_q_that_is_not_conditional(small, monkeypatch):
    """Acceptance judges drafts by the q they would have had without the head."""
    group = sampler_module._draft_group

    def blind(rows, logits, anchor, mask, count, markov, *rest):
        plain = group(rows, logits.clone(), anchor, mask, count, None, *rest)
        made = group(rows, logits, anchor, mask, count, markov, *rest)
        return replace(plain, token_SM=made.token_SM)

    monkeypatch.setattr(sampler_module, "_draft_group", blind)
    outcomes = small.sampled(PARAMS["lossless"], FUSED, 8192)
    assert p_value(outcomes, small.exact(PARAMS["lossless"], FUSED)) < BROKEN


def requests(sampler, **params):
    return cut_requests(sampler, 8, **params)


@pytest.fixture(scope="module")
def reference(policy):
    return tokens_of_ar(policy, lambda temperature: requests("ar", temperature=temperature))


@pytest.mark.parametrize("mode", [dict(max_batch=5), dict(max_batch=8, pages=9, page_size=8)])
def test_coupled_gives_the_tokens_of_ar(policy, reference, mode):
    schedules = (Schedule("two_pass"), Schedule("two_pass", drafts=3), Schedule("fused", levels=(0,)),
                 Schedule("fused", levels=(0, 2, 7)), Schedule("fused", drafts=5, levels=(0, 1, 3)))  # fmt: skip
    for number, schedule in enumerate(schedules):
        temperature, block_size = (0.0, 0.7, 1.0)[number % 3], (4, 8)[number % 2]
        made = Engine(policy, EngineConfig(schedule, block_size=block_size, **mode)).rollout(
            requests("coupled", temperature=temperature)
        )
        assert [s.tokens for s in made] == reference[temperature], (schedule, temperature)


def test_all_samplers_in_one_batch(policy, reference):
    """Rows of a batch are drafted group by group; neighbours with other samplers change nothing."""
    others = [
        RolloutRequest(f"x{i}{name}", prompt(i + 50), SamplingParams(sampler=name, max_tokens=30), i)
        for i, name in itertools.product(range(2), ("ar", "lossless", "mixed"))
    ]
    mingled = [r for pair in itertools.zip_longest(others, requests("coupled")) for r in pair if r is not None]
    done = Engine(policy, EngineConfig(max_batch=9)).rollout(mingled)
    assert [s.tokens for s in done if s.request_id.startswith("r")] == reference[1.0]
    alone = Engine(policy, EngineConfig(max_batch=9)).rollout(others)
    assert [s.tokens for s in done if s.request_id.startswith("x")] == [s.tokens for s in alone]


@pytest.mark.parametrize("schedule", [Schedule("fused", levels=(0, 1, 3)), TWO_PASS], ids=lambda s: s.kind)
def test_every_draft_is_conditional_on_the_committed_token_before_it(policy, schedule):
    """`behavior_logprob` of `mixed` shows q itself: it must be the q of the training layout given the token that stands
    before each draft, the one just sampled before the first."""
    total = 0
    for temperature in (0.7, 1.0):
        for i, made in enumerate(Engine(policy, EngineConfig(schedule, block_size=6)).rollout(
            requests("mixed", temperature=temperature)
        )):  # fmt: skip
            expected, drafted = recompute_behavior(policy, made, CUTS[i % 4], temperature)
            assert np.abs(made.behavior_logprobs - expected).max() <= 1e-5
            total += drafted
    assert total > 100


@torch.no_grad()
def recompute_behavior(policy, sample, cuts, temperature):
    """log m of each token from whole-sequence passes and the decode trace, and how many had a draft."""
    start, text = len(sample.prompt_tokens), [*sample.prompt_tokens, *sample.tokens]
    p = policy.head(policy(causal([text])))[start - 1 : -1]
    target, drafted = p.clone(), 0
    steps = [step for step in sample.trace if step.drafted]
    blocks = [(step.draft_start, step.draft_length) for step in steps]
    layout, _ = diffusion([text], [blocks], policy.mask_token_id)
    hidden_MD = policy(layout)[layout.block_T != CLEAN]
    offsets = np.cumsum([0, *(length for _, length in blocks)])
    for step, offset in zip(steps, offsets, strict=False):
        for position in range(step.anchor + 1, min(step.anchor + step.accepted + 1, step.anchor + step.drafted) + 1):
            if position < len(text):
                row = hidden_MD[offset + position - step.draft_start][None]
                q = policy.draft_head(row, torch.tensor([text[position - 1]]))[0]
                q[policy.mask_token_id] = -torch.inf
                target[position - start] = 0.5 * p[position - start] + 0.5 * q
                drafted += 1
    n = len(sample.tokens)
    full = dict(top_k=0, top_p=1.0, min_p=0.0) | cuts
    params = {name: torch.full((n,), value) for name, value in full.items()}
    logp = processing.process(target, torch.full((n,), temperature), **params)
    return logp.gather(1, torch.tensor(sample.tokens)[:, None])[:, 0].numpy(), drafted
