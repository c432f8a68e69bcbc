"""The joint distribution of the next three tokens, through the whole engine, against exact enumeration.

The checks are shown to see what they are for: each rule is broken once, and the statistic must explode.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from blockroll.kernels.dispatch import using
from blockroll.kernels.verify import reference
from blockroll.model.layout import CLEAN, causal, diffusion
from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.steps import runner as steps_module
from blockroll.rollout.types import RolloutRequest, SamplingParams

VOCABULARY, PROMPT, LENGTH, TEMPERATURE = 6, (4, 5, 1), 3, 0.8
FUSED = Schedule("fused", levels=(0, 1))


@pytest.fixture(scope="module")
def policy(make_policy):
    return make_policy(
        torch.float32, seed=3, sharpness=0.5, vocab_size=VOCABULARY, num_hidden_layers=1, layer_types=None,
        sliding_window=None, hidden_size=16, num_attention_heads=2, num_key_value_heads=2, moe_intermediate_size=16,
    )  # fmt: skip


def sample(policy, sampler, count, schedule=FUSED, more=1, planner=None, batch=2048):
    """Counts of the 6 ** 3 outcomes. `more` tokens are asked for, so that the third may come from a draft too."""
    params = SamplingParams(sampler=sampler, temperature=TEMPERATURE, max_tokens=LENGTH + more, ignore_eos=True)
    engine = Engine(policy, EngineConfig(schedule, block_size=4, max_batch=batch, pages=5000, page_size=8))
    engine.planner = planner
    outcomes = np.zeros(VOCABULARY**LENGTH, dtype=np.int64)
    drafted = 0
    weights = VOCABULARY ** np.arange(LENGTH)[::-1]
    group = min(4096, 8 * batch)
    for i in range(-(-count // group)):
        engine.add(RolloutRequest(f"{i}", PROMPT, params, seed=i, samples=group))
        while engine.has_work:
            for done in engine.step():
                outcomes[int(np.dot(done.tokens[:LENGTH], weights))] += 1
                drafted += int(done.from_draft[:LENGTH].sum())
    assert drafted > 0.1 * count, "drafts must take part"
    return outcomes


@torch.no_grad()
def p_of(policy, texts):
    """log p after each text, at the temperature."""
    rows = np.cumsum([len(t) for t in texts]) - 1
    logits = policy.head(policy(causal(texts))[rows])
    return (logits.double() / TEMPERATURE).log_softmax(-1).numpy()


def exact_p(policy):
    """Probability of each outcome under p."""
    probabilities = []
    texts = [[*PROMPT, *o] for n in range(LENGTH) for o in itertools.product(range(VOCABULARY), repeat=n)]
    table = dict(zip(map(tuple, texts), p_of(policy, texts), strict=True))
    for outcome in itertools.product(range(VOCABULARY), repeat=LENGTH):
        prefix, total = tuple(PROMPT), 0.0
        for token in outcome:
            total += table[prefix][token]
            prefix = (*prefix, token)
        probabilities.append(np.exp(total))
    return np.array(probabilities)


@torch.no_grad()
def exact_mixed(policy, w=0.5):
    """Under `two_pass` every one of the first three tokens that is drafted comes from the block after the prompt while all
    before it were accepted; a rejected one opens a new block. So the target at a position depends on where the block
    began, and the sum runs over where each outcome's first rejection fell."""
    size = 4

    def mask_rows(prefix):
        layout, _ = diffusion([list(prefix)], [[(len(prefix), size)]], policy.mask_token_id)
        q = policy.head(policy(layout)[layout.block_T != CLEAN]).double()
        q[:, policy.mask_token_id] = -torch.inf
        return q

    def p_row(prefix):
        return policy.head(policy(causal([list(prefix)]))[-1:])[0].double()

    totals = np.zeros(VOCABULARY**LENGTH)

    def walk(prefix, start, slots, mass):
        """All continuations of `prefix`, whose current block began at `start` with mask rows `slots`."""
        made = len(prefix) - len(PROMPT)
        if made == LENGTH:
            index = 0
            for token in prefix[len(PROMPT) :]:
                index = index * VOCABULARY + token
            totals[index] += mass
            return
        slot = len(prefix) - start
        q = (slots[slot] / TEMPERATURE).softmax(-1)
        m = ((w * p_row(prefix) + (1 - w) * slots[slot]) / TEMPERATURE).softmax(-1)
        for token in range(VOCABULARY):
            accepted = torch.minimum(q[token], m[token]).item()
            rejected = (m[token] - torch.minimum(q[token], m[token])).item()
            longer = (*prefix, token)
            if accepted:
                walk(longer, start, slots, mass * accepted)
            if rejected:
                walk(longer, len(longer), mask_rows(longer), mass * rejected)

    walk(tuple(PROMPT), len(PROMPT), mask_rows(PROMPT), 1.0)
    return totals


def chi_square(outcomes, probabilities):
    """Pearson's statistic per degree of freedom; outcomes expected fewer than 10 times are pooled."""
    expected = probabilities * outcomes.sum()
    rare = expected < 10
    observed = np.append(outcomes[~rare], outcomes[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    return float((((observed - expected)[keep]) ** 2 / expected[keep]).sum() / (keep.sum() - 1))


# For about 200 degrees of freedom the statistic has mean 1 and standard deviation 0.1.
GOOD, BROKEN = 1.5, 3.0
COUNTS = pytest.mark.parametrize("count", [40_000, pytest.param(200_000, marks=pytest.mark.slow)])


@pytest.mark.parametrize("schedule", [FUSED, Schedule("two_pass")], ids=lambda s: s.kind)
@COUNTS
def test_lossless_is_p(policy, schedule, count):
    probabilities = exact_p(policy)
    assert probabilities.sum() == pytest.approx(1.0)
    assert chi_square(sample(policy, "lossless", count, schedule), probabilities) < GOOD


class PastDecides:
    """A planner that chooses by how many drafts were accepted before. With `peeking` it looks at a draft that waits."""

    def __init__(self, peeking=False):
        self.peeking, self.past, self.seen = peeking, 0, set()
        self.schedules = [s.within(4) for s in (FUSED, Schedule("ar"), Schedule("two_pass", 2), Schedule("fused", 1, (0,), 2))]

    def choose(self, decoding):
        chosen = self.schedules[self.past % 4]
        if self.peeking:
            waits = decoding[0].drafts
            chosen = self.schedules[waits is not None and int(waits.token_SM[decoding[0].draft_index, 0]) % 2]
        self.seen.add(chosen)
        return chosen

    def observe(self, decoding, seconds):
        self.past = 3 * self.past + sum(sample.trace[-1].accepted for sample in decoding) + len(decoding[0].trace)


@pytest.mark.parametrize("count", [1200, pytest.param(60_000, marks=pytest.mark.slow)])
def test_lossless_is_p_when_the_past_decides_what_runs(policy, count):
    planner = PastDecides()
    assert chi_square(sample(policy, "lossless", count, planner=planner, batch=2), exact_p(policy)) < GOOD
    assert len(planner.seen) == 4


@pytest.mark.slow
def test_the_check_sees_a_choice_that_depends_on_unread_drafts(policy):
    made = sample(policy, "lossless", 3000, planner=PastDecides(peeking=True), batch=1)
    assert chi_square(made, exact_p(policy)) > BROKEN


@COUNTS
def test_mixed_is_its_own_distribution(policy, count):
    probabilities = exact_mixed(policy)
    assert probabilities.sum() == pytest.approx(1.0)
    # The last blocks of `two_pass` are as short as the tokens that are left; with 4 more all of these are whole.
    outcomes = sample(policy, "mixed", count, Schedule("two_pass"), more=4)
    assert chi_square(outcomes, probabilities) < GOOD
    assert chi_square(outcomes, exact_p(policy)) > BROKEN


def test_the_check_sees_a_broken_residual(policy, monkeypatch):
    monkeypatch.setattr(reference, "residual_weights", lambda p, q, *rest: p)
    with using("reference"):
        assert chi_square(sample(policy, "lossless", 20_000), exact_p(policy)) > BROKEN


def test_the_check_sees_a_missing_level_shift(policy, monkeypatch):
    """Acceptance judges drafts by the q of another slot than they were drawn from."""
    draft = steps_module.draft

    def shifted(rows, logits, *rest):
        made = draft(rows, logits, *rest)
        return replace(made, q_logits_SMV=made.q_logits_SMV.roll(1, dims=1), q_lse_SM=made.q_lse_SM.roll(1, dims=1))

    monkeypatch.setattr(steps_module, "draft", shifted)
    assert chi_square(sample(policy, "lossless", 20_000), exact_p(policy)) > BROKEN


def test_the_check_sees_q_at_another_temperature(policy, monkeypatch):
    draft = steps_module.draft

    def cold(rows, logits, *rest):
        made = draft(rows, logits, *rest)
        return replace(
            made, q_logits_SMV=made.q_logits_SMV * TEMPERATURE, q_lse_SM=made.q_logits_SMV.double().logsumexp(-1)
        )

    monkeypatch.setattr(steps_module, "draft", cold)
    assert chi_square(sample(policy, "lossless", 20_000), exact_p(policy)) > BROKEN
