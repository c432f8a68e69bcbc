"""Sampling parameters against transformers' logits processors: greedy tokens, log-probabilities, and `coupled` against `ar`.

`test_sampling_enumeration` checks the distributions.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_cases import MODES, SCHEDULES, prompt, tokens_of_ar
from enumeration import adjusted, cut, hugging_face

from blockroll.errors import RequestError
from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.types import RolloutRequest, SamplingParams


def no_repeats(prefix, logits):
    """Forbids the last token, and the token whose id is the prefix's length modulo the vocabulary."""
    logits[prefix[-1]] = -torch.inf
    logits[len(prefix) % len(logits)] -= 1.5
    return logits


CHANGES = {
    "none": dict(),
    "logit_bias": dict(logit_bias={5: 2.5, 3: -50.0, 1: 1.0}),
    "min_tokens": dict(min_tokens=2, stop_token_ids=(2, 4), logit_bias={2: 3.0}),
    "repetition": dict(repetition_penalty=1.7),
    "presence": dict(presence_penalty=1.5),
    "frequency": dict(frequency_penalty=1.3),
    "processor": dict(logits_processors=[no_repeats]),
    "all": dict(logit_bias={1: 0.5}, min_tokens=2, stop_token_ids=(2,), repetition_penalty=0.8, presence_penalty=-0.7,
                frequency_penalty=0.9, logits_processors=[no_repeats]),
    "all and cut": dict(logit_bias={1: 0.5}, repetition_penalty=1.2, frequency_penalty=0.9, top_p=0.9, top_k=5),
    "penalties and top_p": dict(repetition_penalty=1.3, presence_penalty=0.8, frequency_penalty=0.5, top_p=0.7),
    "processor and min_p": dict(min_tokens=3, stop_token_ids=(2,), logits_processors=[no_repeats], top_k=-1, min_p=0.1),
}  # fmt: skip


@pytest.fixture(scope="module")
def policy(make_policy):
    """float64: a test of tokens must not depend on the order of a sum."""
    return make_policy(sharpness=0.6)


def requests(sampler, temperature, count=22):
    changes = list(CHANGES.values())
    return [
        RolloutRequest(f"r{i:02d}", prompt(i), SamplingParams(
            sampler=sampler, temperature=temperature, max_tokens=18, **changes[i % len(changes)]), seed=i)
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def reference(policy):
    return tokens_of_ar(policy, lambda temperature: requests("ar", temperature), (0.0, 1.0))


def test_greedy_tokens_are_those_of_transformers(policy, reference):
    logits = hugging_face(policy)
    for request, tokens in zip(requests("ar", 0.0)[: len(CHANGES)], reference[0.0], strict=False):
        made = []
        while len(made) < len(tokens):
            after = logits((*request.prompt_tokens, *made))
            made.append(int(adjusted(request.params, request.prompt_tokens, made, after).argmax()))
        assert made == tokens, request.params
    plain = Engine(policy).rollout([replace(r, params=SamplingParams("ar", 0.0, max_tokens=18)) for r in requests("ar", 0.0)])
    changed = [i for i, (a, b) in enumerate(zip(plain, reference[0.0], strict=True)) if a.tokens != b]
    assert {i % len(CHANGES) for i in changed} >= set(range(1, len(CHANGES))) - {2}, "every change changes something"


@pytest.mark.parametrize(("mode", "temperature"), [("batch", 0.0), *((mode, 1.0) for mode in MODES)])
def test_coupled_gives_the_tokens_of_ar(policy, reference, mode, temperature):
    for i, schedule in enumerate(SCHEDULES):
        if mode != "batch" and i % 3 != len(mode) % 3:
            continue
        samples = Engine(policy, EngineConfig(schedule, block_size=8, **MODES[mode])).rollout(requests("coupled", temperature))
        assert [s.tokens for s in samples] == reference[temperature], (schedule, mode)


@pytest.mark.parametrize("sampler", ["lossless", "coupled", "mixed"])
def test_both_log_probabilities(policy, sampler):
    """`logprobs` are p's own, `behavior_logprobs` those of what was drawn from, `support_logmass` what the cut-offs left."""
    logits = hugging_face(policy)
    for name, change in CHANGES.items():
        params = SamplingParams(sampler=sampler, temperature=0.8, max_tokens=8, mix_weight=1.0, **change)
        (sample,) = Engine(policy, EngineConfig(Schedule("fused", levels=(0, 2)), block_size=6)).rollout(
            [RolloutRequest("a", prompt(4), params, seed=3)]
        )
        for i, token in enumerate(sample.tokens):
            raw = logits((*prompt(4), *sample.tokens[:i]))
            own = adjusted(params, prompt(4), sample.tokens[:i], raw)
            drawn = cut(params, own)
            left = (own / 0.8).softmax(-1)[drawn > -torch.inf].sum().log().item()
            assert sample.logprobs[i] == pytest.approx((raw / 0.8).log_softmax(-1)[token].item(), abs=2e-6), name
            assert sample.behavior_logprobs[i] == pytest.approx(drawn[token].item(), abs=2e-6), name
            recorded = 0.0 if sample.support_logmass is None else sample.support_logmass[i]
            assert recorded == pytest.approx(left, abs=2e-6), name


def test_drafts_respect_a_constraint(policy):
    """A processor that leaves one token at each place: q is adjusted too, so nearly every draft is accepted."""

    def counting(prefix, logits):
        return torch.full_like(logits, -torch.inf).index_fill(0, torch.tensor([4 + len(prefix) % 30]), 0.0)

    params = SamplingParams("lossless", max_tokens=64, ignore_eos=True, logits_processors=[counting])
    (sample,) = Engine(policy, EngineConfig(block_size=8)).rollout([RolloutRequest("a", (5, 6), params)])
    assert sample.tokens == [4 + (2 + i) % 30 for i in range(64)]
    assert sample.tokens_per_forward > 5
    assert np.abs(sample.behavior_logprobs).max() == 0
    assert sample.logprobs.max() < 0


def test_a_processor_sees_the_whole_prefix_and_its_errors_name_it(policy):
    seen = []

    def look(prefix, logits):
        seen.append(tuple(prefix))
        return logits

    params = SamplingParams("ar", max_tokens=4, ignore_eos=True, logits_processors=(look,))
    (sample,) = Engine(policy).rollout([RolloutRequest("a", (5, 6), params)])
    assert seen == [(5, 6, *sample.tokens[:i]) for i in range(4)]
    for wrong in (lambda _, x: x[:3], lambda _, x: None, lambda _, x: x - torch.inf, lambda _, x: x * torch.nan):
        engine = Engine(policy)
        with pytest.raises(RequestError, match=r"^logits_processors: a function returned .*; return a tensor of"):
            engine.rollout([RolloutRequest("a", (5, 6), replace(params, logits_processors=(wrong,)))])
        assert not engine.has_work


def test_the_only_token_left_may_be_the_mask_token(policy):
    """No draft is the mask token, and p may be."""
    mask = policy.mask_token_id

    def only(_, logits):
        return torch.full_like(logits, -torch.inf).index_fill(0, torch.tensor([mask]), 0.0)

    for sampler in ("lossless", "coupled", "mixed"):
        params = SamplingParams(sampler, max_tokens=5, ignore_eos=True, logits_processors=[only])
        (sample,) = Engine(policy).rollout([RolloutRequest("a", (5, 6), params)])
        assert sample.tokens == [mask] * 5


@pytest.mark.parametrize(("field", "value", "text"), [
    ("n", 0, "n: 0 is no whole number in 1..65536; ask for"),
    ("seed", -1, "seed: -1 is no whole number in 0..2"),
    ("stop", ["a", ""], "stop: '' is no text of 1 to 256 bytes; give short texts"),
    ("stop", 5, "stop: 5 is no list"),
    ("min_tokens", 300, "min_tokens: 300 is no whole number in 0..max_tokens \\(256\\)"),
    ("logit_bias", {3: float("nan")}, "logit_bias: nan of token 3 is outside -inf..1e\\+06"),
    ("logit_bias", {-3: 1.0}, "logit_bias: -3 is no token id"),
    ("logit_bias", [1, 2], "logit_bias: \\[1, 2\\] is no mapping"),
    ("logit_bias", {7: 1e39}, "logit_bias: 1e\\+39 of token 7 is outside -inf..1e\\+06; use -inf to forbid"),
    ("logit_bias", {7: 10**400}, "logit_bias: 10+... of token 7 is"),
    ("repetition_penalty", 0, "repetition_penalty: 0 is outside 0.001..1000.0; use 1.0"),
    ("repetition_penalty", 1e-39, "repetition_penalty: 1e-39 is outside"),
    ("repetition_penalty", 1e39, "repetition_penalty: 1e\\+39 is outside"),
    ("repetition_penalty", float("nan"), "repetition_penalty: nan is outside"),
    ("temperature", 1e-39, "temperature: 1e-39 is neither 0 nor in 1e-06..10000; use 0 for greedy"),
    ("temperature", 9e-7, "temperature: 9e-07 is neither"),
    ("temperature", float("nan"), "temperature: nan is neither"),
    ("temperature", -1, "temperature: -1 is neither"),
    ("presence_penalty", 2.5, "presence_penalty: 2.5 is outside -2..2; use 0"),
    ("frequency_penalty", float("nan"), "frequency_penalty: nan is outside"),
    ("logprobs", -1, "logprobs: -1 is no whole number in 0..32767; use None"),
    ("prompt_logprobs", True, "prompt_logprobs: True is no whole"),
    ("logits_processors", [3], "logits_processors: 3 cannot be called; give functions"),
])  # fmt: skip
def test_a_wrong_value_is_named(field, value, text):
    with pytest.raises(RequestError, match=f"^{text}"):
        SamplingParams(**{field: value})


@pytest.mark.parametrize("sampler", ["ar", "lossless", "coupled", "mixed"])
@pytest.mark.parametrize("params", [
    dict(temperature=1e-6, repetition_penalty=1e-3, logit_bias={i: 1e6 for i in range(40)}),
    dict(temperature=1e-6, repetition_penalty=1e3, logit_bias={i: -1e6 for i in range(40)}, frequency_penalty=2.0),
    dict(temperature=1e-6, repetition_penalty=1e3, logit_bias={7: 1e6}, top_p=1e-30),
    dict(temperature=9999.0, repetition_penalty=1e-3, logit_bias={7: -1e6}, min_p=1 - 1e-12),
])  # fmt: skip
def test_the_outermost_values_keep_every_number_finite(make_policy, sampler, params):
    engine = Engine(make_policy(torch.float32, sharpness=0.6))
    asked = SamplingParams(sampler, max_tokens=9, ignore_eos=True, **params)
    for sample in engine.rollout([RolloutRequest("a", (5, 7), asked, samples=3)]):
        assert np.isfinite(sample.logprobs).all()
        assert np.isfinite(sample.behavior_logprobs).all()
        assert sample.support_logmass is None or np.isfinite(sample.support_logmass).all()


def test_values_that_do_not_fit_the_policy_are_refused(policy):
    engine = Engine(policy)
    for params, text in (
        (SamplingParams(logit_bias={40: 1.0}), "logit_bias: request 'a' names token 40 and the vocabulary has 40"),
        (SamplingParams(logit_bias=[(i, -1e39) for i in range(40)]), "logit_bias: request 'a' forbids every token"),
        (SamplingParams(min_tokens=1, stop_token_ids=(0, 1), logit_bias=dict.fromkeys(range(2, 40), -math.inf)),
         "min_tokens: request 'a' has no token"),
        (SamplingParams(stop="x"), "stop: request 'a' has stop strings, and the policy has no tokenizer"),
        (SamplingParams(min_tokens=1, stop_token_ids=tuple(range(40))), "min_tokens: request 'a' has no token"),
    ):
        with pytest.raises(RequestError, match=f"^{text}"):
            engine.add(RolloutRequest("a", (5,), params))
        assert not engine.has_work


def test_collections_are_kept_as_tuples():
    params = SamplingParams(stop="a", logit_bias={7: 1, 3: 2.0}, stop_token_ids=[4])
    assert (params.stop, params.logit_bias, params.stop_token_ids) == (("a",), ((3, 2.0), (7, 1.0)), (4,))
    assert replace(params, n=2).logit_bias == params.logit_bias
    assert hash(params) != hash(SamplingParams())
    assert SamplingParams(stop=None, logit_bias=None, stop_token_ids=None, logits_processors=None) == SamplingParams()
    request = RolloutRequest("a", (1,), SamplingParams(n=3, seed=7))
    assert (request.samples, request.seed) == (3, 7)
    assert RolloutRequest("a", (1,), SamplingParams(n=3, seed=7), 8, 2).samples == 2
