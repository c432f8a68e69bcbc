"""The joint distribution of four tokens, through the whole engine, against exact enumeration.

The checks are shown to see what they are for: each rule is broken once, and the statistic must explode.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from enumeration import BROKEN, GOOD, TEMPERATURE, Enumeration, p_value, small_policy

from blockroll.kernels.dispatch import using
from blockroll.kernels.verify import reference
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.steps import runner as steps_module
from blockroll.rollout.types import SamplingParams

FUSED, TWO_PASS = Schedule("fused", levels=(0, 1)), Schedule("two_pass")
LOSSLESS, MIXED = (SamplingParams(sampler, temperature=TEMPERATURE) for sampler in ("lossless", "mixed"))
COUNTS = pytest.mark.parametrize("count", [12_288, pytest.param(200_000, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def small(make_policy):
    return Enumeration(small_policy(make_policy))


def agreement(small, params, count, schedule=FUSED, **how):
    """The p-value of `count` samples of the engine."""
    expected = small.exact(params, schedule)
    assert sum(expected.values()) == pytest.approx(1.0)
    return p_value(small.sampled(params, schedule, count, **how), expected)


@pytest.mark.parametrize("schedule", [FUSED, TWO_PASS], ids=lambda s: s.kind)
@COUNTS
def test_lossless_is_p(small, schedule, count):
    assert agreement(small, LOSSLESS, count, schedule) > GOOD


@pytest.mark.parametrize("draft_temperature", [0.5, 1.6])
@pytest.mark.parametrize("params", [LOSSLESS, MIXED], ids=lambda p: p.sampler)
@pytest.mark.parametrize("schedule", [FUSED, TWO_PASS], ids=lambda s: s.kind)
@pytest.mark.parametrize("count", [4096, pytest.param(200_000, marks=pytest.mark.slow)])
def test_drafts_at_a_temperature_of_their_own(small, schedule, params, draft_temperature, count):
    """`lossless` is p. With `mixed` the drafts that are accepted decide which tokens have a draft, and so a mixture, at all."""
    expected = small.exact(params, schedule, draft_temperature)
    assert p_value(small.sampled(params, schedule, count, draft_temperature=draft_temperature), expected) > GOOD
    if params.sampler == "lossless":
        plain = small.exact(params, schedule)
        assert all(expected[outcome] == pytest.approx(mass) for outcome, mass in plain.items())


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
def test_lossless_is_p_when_the_past_decides_what_runs(small, count):
    planner = PastDecides()
    assert agreement(small, LOSSLESS, count, planner=planner, batch=2) > GOOD
    assert len(planner.seen) == 4


@pytest.mark.slow
def test_the_check_sees_a_choice_that_depends_on_unread_drafts(small):
    assert agreement(small, LOSSLESS, 3000, planner=PastDecides(peeking=True), batch=1) < BROKEN


@pytest.mark.parametrize("schedule", [
    FUSED, TWO_PASS, Schedule("two_pass", drafts=2), Schedule("fused", levels=(0,)), Schedule("fused", drafts=2, levels=(0, 2)),
], ids=lambda s: s.label)  # fmt: skip
@pytest.mark.parametrize("count", [4096, pytest.param(200_000, marks=pytest.mark.slow)])
def test_mixed_is_its_own_distribution(small, schedule, count):
    outcomes = small.sampled(MIXED, schedule, count)
    assert p_value(outcomes, small.exact(MIXED, schedule)) > GOOD
    assert p_value(outcomes, small.exact(LOSSLESS, schedule)) < BROKEN


def test_the_check_sees_a_broken_residual(small, monkeypatch):
    monkeypatch.setattr(reference, "residual_weights", lambda p, q, *rest: p)
    with using("reference"):
        assert agreement(small, LOSSLESS, 8192) < BROKEN


def test_the_check_sees_a_missing_level_shift(small, monkeypatch):
    """Acceptance judges drafts by the q of another slot than they were drawn from."""
    draft = steps_module.draft

    def shifted(rows, logits, *rest):
        made = draft(rows, logits, *rest)
        return replace(made, q_logits_SMV=made.q_logits_SMV.roll(1, dims=1), q_lse_SM=made.q_lse_SM.roll(1, dims=1))

    monkeypatch.setattr(steps_module, "draft", shifted)
    assert agreement(small, LOSSLESS, 8192) < BROKEN


def test_the_check_sees_q_at_another_temperature(small, monkeypatch):
    draft = steps_module.draft

    def cold(rows, logits, *rest):
        made = draft(rows, logits, *rest)
        return replace(
            made, q_logits_SMV=made.q_logits_SMV * TEMPERATURE, q_lse_SM=made.q_logits_SMV.double().logsumexp(-1)
        )

    monkeypatch.setattr(steps_module, "draft", cold)
    assert agreement(small, LOSSLESS, 16_384) < BROKEN
