"""A Markov head: drafts that know the token before them, and samplers that stay what they promise."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from blockroll.model.layout import CLEAN, causal, diffusion
from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.sampling import processing
from blockroll.rollout.sampling import sampler as sampler_module
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.types import RolloutRequest, SamplingParams

VOCABULARY, PROMPT, LENGTH, TEMPERATURE = 5, (4, 3, 1), 3, 0.8
FUSED, TWO_PASS = Schedule("fused", levels=(0, 1)), Schedule("two_pass")
# Pearson's statistic per degree of freedom: mean 1, standard deviation about 0.13 for 125 outcomes.
GOOD, BROKEN = 1.6, 3.0


def with_markov(policy, rank=4, strength=1.0):
    policy.add_markov(rank, torch.Generator().manual_seed(1))
    policy.markov.next.weight.data.normal_(0, strength, generator=torch.Generator().manual_seed(2))
    return policy.requires_grad_(False)


@pytest.fixture(scope="module")
def small(make_policy):
    return with_markov(make_policy(
        torch.float32, seed=3, sharpness=0.5, vocab_size=VOCABULARY, num_hidden_layers=1, layer_types=None,
        sliding_window=None, hidden_size=16, num_attention_heads=2, num_key_value_heads=2, moe_intermediate_size=16,
    ))  # fmt: skip


@pytest.fixture(scope="module")
def policy(make_policy):
    """float64: a test of tokens must not depend on the order of a sum."""
    return with_markov(make_policy(sharpness=0.6), strength=0.5)


def outcomes_of(policy, sampler, count, schedule, more=1):
    """Counts of the 5 ** 3 outcomes. `more` tokens are asked for, so that the third may come from a draft too."""
    params = SamplingParams(sampler=sampler, temperature=TEMPERATURE, max_tokens=LENGTH + more, ignore_eos=True)
    engine = Engine(policy, EngineConfig(schedule, block_size=4, max_batch=2048, pages=5000, page_size=8))
    weights = VOCABULARY ** np.arange(LENGTH)[::-1]
    outcomes, drafted = np.zeros(VOCABULARY**LENGTH, dtype=np.int64), 0
    for i in range(-(-count // 4096)):
        for done in engine.rollout([RolloutRequest(f"{i}", PROMPT, params, seed=i, samples=4096)]):
            outcomes[int(np.dot(done.tokens[:LENGTH], weights))] += 1
            drafted += int(done.from_draft[:LENGTH].sum())
    assert drafted > 0.15 * count, "drafts must take part"
    return outcomes


@torch.no_grad()
def exact(policy, mix_weight=1.0):
    """Probability of each outcome when position i is drawn from m_i = softmax of the mixed logits of p and q; p for weight 1.

    Under `two_pass` a drafted token comes from the block that opened after the last rejection, so the sum runs over where
    the first rejection of each outcome fell. q of a slot is the one given the token before it.
    """

    def mask_rows(prefix):
        layout, _ = diffusion([list(prefix)], [[(len(prefix), 4)]], policy.mask_token_id)
        return policy(layout)[layout.block_T != CLEAN]

    totals = np.zeros(VOCABULARY**LENGTH)

    def walk(prefix, start, hidden_BD, mass):
        made = prefix[len(PROMPT) :]
        if len(made) == LENGTH:
            totals[int(np.dot(made, VOCABULARY ** np.arange(LENGTH)[::-1]))] += mass
            return
        slot = len(prefix) - start
        q = policy.draft_head(hidden_BD[slot : slot + 1], torch.tensor(prefix[-1:]))[0].double()
        q[policy.mask_token_id] = -torch.inf
        p = policy.head(policy(causal([list(prefix)]))[-1]).double()
        m = p if mix_weight == 1 else mix_weight * p + (1 - mix_weight) * q
        q, m = (q / TEMPERATURE).softmax(-1), (m / TEMPERATURE).softmax(-1)
        for token in range(VOCABULARY):
            accepted = torch.minimum(q[token], m[token]).item()
            rejected = m[token].item() - accepted
            longer = (*prefix, token)
            if accepted:
                walk(longer, start, hidden_BD, mass * accepted)
            if rejected:
                walk(longer, len(longer), mask_rows(longer), mass * rejected)

    walk(PROMPT, len(PROMPT), mask_rows(PROMPT), 1.0)
    return totals


def chi_square(outcomes, probabilities):
    """Pearson's statistic per degree of freedom; outcomes expected fewer than 10 times are pooled."""
    expected = probabilities * outcomes.sum()
    rare = expected < 10
    observed = np.append(outcomes[~rare], outcomes[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    return float((((observed - expected)[keep]) ** 2 / expected[keep]).sum() / (keep.sum() - 1))


COUNTS = pytest.mark.parametrize("count", [12_288, pytest.param(200_000, marks=pytest.mark.slow)])


@pytest.mark.parametrize("schedule", [FUSED, TWO_PASS], ids=lambda s: s.kind)
@COUNTS
def test_lossless_is_p(small, schedule, count):
    probabilities = exact(small)
    assert probabilities.sum() == pytest.approx(1.0)
    assert chi_square(outcomes_of(small, "lossless", count, schedule), probabilities) < GOOD


@COUNTS
def test_mixed_is_its_own_distribution(small, count):
    probabilities = exact(small, mix_weight=0.5)
    assert probabilities.sum() == pytest.approx(1.0)
    # The last blocks of `two_pass` are as short as the tokens that are left; with 4 more all of these are whole.
    outcomes = outcomes_of(small, "mixed", count, TWO_PASS, more=4)
    assert chi_square(outcomes, probabilities) < GOOD
    assert chi_square(outcomes, exact(small)) > BROKEN


def test_the_check_sees_a_q_that_is_not_conditional(small, monkeypatch):
    """Acceptance judges drafts by the q they would have had without the head."""
    group = sampler_module._draft_group

    def blind(rows, logits, anchor, mask, count, markov, *rest):
        plain = group(rows, logits.clone(), anchor, mask, count, None, *rest)
        made = group(rows, logits, anchor, mask, count, markov, *rest)
        return replace(plain, token_SM=made.token_SM)

    monkeypatch.setattr(sampler_module, "_draft_group", blind)
    assert chi_square(outcomes_of(small, "lossless", 8192, FUSED), exact(small)) > BROKEN


CUTS = [dict(), dict(top_p=0.8), dict(top_k=5), dict(top_k=9, top_p=0.9, min_p=0.02)]


def prompt(i):
    draw = torch.Generator().manual_seed(i)
    return tuple(torch.randint(4, 40, (1 + (i * 5) % 23,), generator=draw).tolist())


def requests(sampler, count=8, **params):
    return [
        RolloutRequest(f"r{i:02d}", prompt(i), SamplingParams(sampler=sampler, max_tokens=22, **CUTS[i % 4], **params), i)
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def reference(policy):
    engine = Engine(policy, EngineConfig(Schedule("ar"), max_batch=1))
    return {t: [s.tokens for s in engine.rollout(requests("ar", temperature=t))] for t in (0.0, 0.7, 1.0)}


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
