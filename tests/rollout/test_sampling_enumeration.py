"""Each sampling parameter through the whole engine: the joint distribution of four tokens against exact enumeration, for every
sampler and schedule.

`coupled` gives the tokens of `ar`, so its distribution is that of `ar`: `test_sampling_params` compares the tokens under each
schedule.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from enumeration import BROKEN, GOOD, PROMPT, TEMPERATURE, VOCABULARY, Enumeration, p_value, small_policy

from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.sampling import sampler as sampler_module
from blockroll.rollout.sampling.adjustment import Adjustment
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.types import RolloutRequest, SamplingParams

FUSED, TWO_PASS = Schedule("fused", levels=(0, 1)), Schedule("two_pass")
WAYS = [("ar", Schedule("ar")), *((sampler, schedule) for sampler in ("lossless", "mixed") for schedule in (TWO_PASS, FUSED))]


def no_repeats(prefix, logits):
    """Forbids the last token, and makes the token whose id is the prefix's length modulo the vocabulary less likely."""
    logits[prefix[-1]] = -torch.inf
    logits[len(prefix) % len(logits)] -= 1.5
    return logits


CASES = {
    "temperature": dict(temperature=1.7),
    "top_k": dict(top_k=3),
    "top_p": dict(top_p=0.8),
    "min_p": dict(min_p=0.25),
    "logit_bias": dict(logit_bias={0: 1.5, 3: -50.0, 1: 1.0}),
    "min_tokens": dict(min_tokens=2, stop_token_ids=(2,), logit_bias={2: 1.5}),
    "repetition_penalty": dict(repetition_penalty=1.7),
    "presence_penalty": dict(presence_penalty=1.5),
    "frequency_penalty": dict(frequency_penalty=1.3),
    "logits_processors": dict(logits_processors=[no_repeats]),
    "penalties and top_p": dict(repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.6, top_p=0.85),
    "biases and cuts": dict(logit_bias={1: 0.5}, logits_processors=[no_repeats], top_k=4, min_p=0.1),
    "all": dict(temperature=1.2, top_k=4, top_p=0.95, min_p=0.05, logit_bias={1: 0.5}, min_tokens=2, stop_token_ids=(2,),
                repetition_penalty=0.8, presence_penalty=0.7, frequency_penalty=0.9, logits_processors=[no_repeats]),
}  # fmt: skip


def params(sampler, name):
    return SamplingParams(sampler, **{"temperature": TEMPERATURE, **CASES[name]})


@pytest.fixture(scope="module")
def small(make_policy):
    return Enumeration(small_policy(make_policy))


def agreement(small, asked, schedule, count):
    """The p-value of `count` samples."""
    expected = small.exact(asked, schedule)
    assert sum(expected.values()) == pytest.approx(1.0)
    drafted = 0 if asked.sampler == "ar" else 0.15
    return p_value(small.sampled(asked, schedule, count, drafted=drafted), expected)


@pytest.mark.parametrize("sampler", ["lossless", "mixed"])
@pytest.mark.parametrize("schedule", [FUSED, TWO_PASS], ids=lambda s: s.kind)
def test_all_parameters_together(small, schedule, sampler):
    assert agreement(small, params(sampler, "all"), schedule, 4096) > GOOD


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "schedule"), WAYS, ids=lambda x: getattr(x, "kind", x))
@pytest.mark.parametrize("name", CASES)
def test_each_parameter_by_100_000_samples(small, record_property, name, sampler, schedule):
    found = agreement(small, params(sampler, name), schedule, 102_400)
    record_property("p_value", f"{found:.3g}")
    assert found > GOOD


def test_each_case_is_a_distribution_of_its_own(small):
    """100,000 samples tell each case from no parameters at all."""
    plain = small.exact(SamplingParams("lossless", temperature=TEMPERATURE), FUSED)
    for name in CASES:
        for sampler in ("lossless", "mixed"):
            changed = small.exact(params(sampler, name), FUSED)
            assert p_value(Counter({outcome: 102_400 * p for outcome, p in changed.items()}), plain) < BROKEN, name


def test_the_check_sees_rows_that_do_not_follow_their_drafts(small, monkeypatch):
    """Every verify row is adjusted as if no draft had been accepted."""
    monkeypatch.setattr(Adjustment, "along", lambda self, logits_SRV, _: torch.stack(
        [self.adjusted(self.start(logits_SRV.shape[-1]), row_SV) for row_SV in logits_SRV.unbind(1)], 1))  # fmt: skip
    asked = replace(params("lossless", "presence_penalty"), repetition_penalty=1.7)
    assert agreement(small, asked, FUSED, 4096) < BROKEN


def test_the_check_sees_drafts_that_ignore_the_cuts(small, monkeypatch):
    """Acceptance judges drafts by a q with cut-offs, and they were drawn from one without."""
    choose = sampler_module._choose

    def loose(rows, group, q_logits_SKV, noise):
        token_SK, _ = choose(replace(rows, top_p_S=torch.ones_like(rows.top_p_S)), group, q_logits_SKV, noise)
        return token_SK, choose(rows, group, q_logits_SKV, noise)[1]

    monkeypatch.setattr(sampler_module, "_choose", loose)
    assert agreement(small, params("lossless", "penalties and top_p"), FUSED, 4096) < BROKEN


def test_samples_of_one_request_and_of_two_seeds_are_independent(small):
    """First tokens of two samples of a request (`n`), and of one sample under two values of `seed`."""
    asked = SamplingParams("lossless", temperature=TEMPERATURE, max_tokens=2, ignore_eos=True, n=2)
    engine = Engine(small.policy, EngineConfig(FUSED, block_size=4, max_batch=1024, pages=4000, page_size=8))
    done = engine.rollout([RolloutRequest(f"{seed}", PROMPT, replace(asked, seed=seed)) for seed in range(3000)])
    first = {(int(sample.request_id), sample.sample): sample.tokens[0] for sample in done}
    p = Counter()
    for outcome, mass in small.exact(asked, FUSED).items():
        p[outcome[0]] += mass
    pairs = {(a, b): p[a] * p[b] for a in range(VOCABULARY) for b in range(VOCABULARY)}
    assert p_value(Counter((first[seed, 0], first[seed, 1]) for seed in range(3000)), pairs) > GOOD
    assert p_value(Counter((first[seed, 0], first[seed + 1, 0]) for seed in range(0, 3000, 2)), pairs) > GOOD
    again = engine.rollout([RolloutRequest("x", PROMPT, replace(asked, seed=77, n=3))])
    assert [sample.tokens[0] for sample in again[:2]] == [first[77, 0], first[77, 1]]
