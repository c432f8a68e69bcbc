"""Parameters that change logits, against transformers' logits processors and plain Python: greedy tokens, distributions by
enumeration, and `coupled` against `ar`."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import ZayaForCausalLM
from transformers.generation import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from blockroll.errors import RequestError
from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.sampling.adjustment import Adjustment
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.types import RolloutRequest, SamplingParams

SCHEDULES = [
    Schedule("ar"),
    Schedule("two_pass"),
    Schedule("two_pass", drafts=3),
    Schedule("fused"),
    Schedule("fused", levels=(0,)),
    Schedule("fused", levels=(0, 2, 7)),
    Schedule("fused", drafts=5, levels=(0, 1, 3)),
]
MODES = {
    "alone": dict(max_batch=1),
    "batch": dict(max_batch=7, prefill_rows=5),
    "preempted": dict(max_batch=8, pages=9, page_size=8),
}


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
}  # fmt: skip


def adjusted(params, prompt, made, logits):
    """Logits of the token after prompt and made tokens, by transformers' processors and by hand."""
    x = logits.clone()
    if len(made) < params.min_tokens:
        x[list(params.stop_token_ids)] = -torch.inf
    ids = torch.tensor([[*prompt, *made]])
    if params.logit_bias:
        bias = SequenceBiasLogitsProcessor([[[token], value] for token, value in params.logit_bias])
        x = bias(ids, x[None])[0].to(x.dtype)
    for processor in params.logits_processors:
        x = processor([*prompt, *made], x)
    if params.repetition_penalty != 1:
        x = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, x[None])[0]
    for token, count in Counter(made).items():
        x[token] -= params.presence_penalty + params.frequency_penalty * count
    return x


def hugging_face(policy):
    """transformers' model of the same weights: prefix -> logits of the next token."""
    model = ZayaForCausalLM(policy.config).to(policy.dtype).eval()
    model.set_experts_implementation("eager")  # the grouped product takes no float64
    missing, unexpected = model.load_state_dict(policy.state_dict(), strict=False)
    assert not unexpected
    assert all("rotary" in name for name in missing)

    @torch.no_grad()
    def logits(prefix):
        return model(torch.tensor([list(prefix)])).logits[0, -1]

    return logits


@pytest.fixture(scope="module")
def policy(make_policy):
    """float64: a test of tokens must not depend on the order of a sum."""
    return make_policy(sharpness=0.6)


def prompt(i):
    draw = torch.Generator().manual_seed(i)
    return tuple(torch.randint(4, 40, (1 + (i * 5) % 23,), generator=draw).tolist())


def requests(sampler, temperature, count=18):
    changes = list(CHANGES.values())
    return [
        RolloutRequest(f"r{i:02d}", prompt(i), SamplingParams(
            sampler=sampler, temperature=temperature, max_tokens=18, **changes[i % len(changes)]), seed=i)
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def reference(policy):
    engine = Engine(policy, EngineConfig(Schedule("ar"), max_batch=1))
    return {t: [s.tokens for s in engine.rollout(requests("ar", t))] for t in (0.0, 1.0)}


def test_greedy_tokens_are_those_of_transformers(policy, reference):
    logits = hugging_face(policy)
    for request, tokens in zip(requests("ar", 0.0)[:9], reference[0.0], strict=False):
        made = []
        while len(made) < len(tokens):
            after = logits((*request.prompt_tokens, *made))
            made.append(int(adjusted(request.params, request.prompt_tokens, made, after).argmax()))
        assert made == tokens, request.params
    plain = Engine(policy).rollout([replace(r, params=SamplingParams("ar", 0.0, max_tokens=18)) for r in requests("ar", 0.0)])
    changed = [i for i, (a, b) in enumerate(zip(plain, reference[0.0], strict=True)) if a.tokens != b]
    assert {i % len(CHANGES) for i in changed} >= set(range(1, len(CHANGES))) - {2}, "every change changes something"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_coupled_gives_the_tokens_of_ar(policy, reference, mode, temperature):
    for i, schedule in enumerate(SCHEDULES):
        if mode != "batch" and i % 3 != len(mode) % 3:
            continue
        samples = Engine(policy, EngineConfig(schedule, block_size=8, **MODES[mode])).rollout(requests("coupled", temperature))
        assert [s.tokens for s in samples] == reference[temperature], (schedule, mode)


@pytest.mark.parametrize("sampler", ["lossless", "coupled", "mixed"])
def test_both_log_probabilities(policy, sampler):
    """`logprobs` are p's own, `behavior_logprobs` those of what was drawn from."""
    logits = hugging_face(policy)
    for name, change in CHANGES.items():
        params = SamplingParams(sampler=sampler, temperature=0.8, max_tokens=8, mix_weight=1.0, **change)
        (sample,) = Engine(policy, EngineConfig(Schedule("fused", levels=(0, 2)), block_size=6)).rollout(
            [RolloutRequest("a", prompt(4), params, seed=3)]
        )
        if params.top_p < 1:
            continue  # with cut-offs the masses of `support_logmass` are between the two
        for i, token in enumerate(sample.tokens):
            raw = logits((*prompt(4), *sample.tokens[:i]))
            own = adjusted(params, prompt(4), sample.tokens[:i], raw)
            assert sample.logprobs[i] == pytest.approx((raw / 0.8).log_softmax(-1)[token].item(), abs=2e-6), name
            assert sample.behavior_logprobs[i] == pytest.approx((own / 0.8).log_softmax(-1)[token].item(), abs=2e-6), name


VOCABULARY, PROMPT, LENGTH, TEMPERATURE = 6, (4, 5, 1), 3, 0.8


@pytest.fixture(scope="module")
def small(make_policy):
    return make_policy(
        torch.float32, seed=3, sharpness=0.5, vocab_size=VOCABULARY, num_hidden_layers=1, layer_types=None,
        sliding_window=None, hidden_size=16, num_attention_heads=2, num_key_value_heads=2, moe_intermediate_size=16,
    )  # fmt: skip


@pytest.fixture(scope="module")
def small_logits(small):
    model = hugging_face(small)
    prefixes = [(*PROMPT, *o) for n in range(LENGTH) for o in itertools.product(range(VOCABULARY), repeat=n)]
    return {prefix: model(prefix).double() for prefix in prefixes}


def exact(params, logits):
    """Probability of each outcome of at most LENGTH tokens."""
    found = {}

    def walk(made, mass):
        if len(made) == LENGTH or (made and made[-1] in params.stop_token_ids):
            found[made] = mass
            return
        p = (adjusted(params, PROMPT, made, logits[(*PROMPT, *made)]) / TEMPERATURE).softmax(-1)
        for token in range(VOCABULARY):
            if p[token] > 0:
                walk((*made, token), mass * p[token].item())

    walk((), 1.0)
    return found


def chi_square(policy, params, schedule, count, expected):
    """Pearson's statistic per degree of freedom (mean 1, standard deviation about 0.1) of `count` samples; the share drafted."""
    engine = Engine(policy, EngineConfig(schedule, block_size=4, max_batch=1024, pages=4000, page_size=8))
    outcomes, drafted = Counter(), 0
    params = replace(params, max_tokens=LENGTH + 1, temperature=TEMPERATURE, ignore_eos=True)
    for i in range(-(-count // 4096)):
        for done in engine.rollout([RolloutRequest(f"{i}", PROMPT, params, seed=i, samples=4096)]):
            outcomes[tuple(done.tokens[:LENGTH])] += 1
            drafted += int(done.from_draft[:LENGTH].sum())
    total = sum(outcomes.values())
    assert set(outcomes) <= set(expected)
    want = np.array([expected[outcome] * total for outcome in expected])
    got = np.array([outcomes[outcome] for outcome in expected])
    rare = want < 10
    want, got = np.append(want[~rare], want[rare].sum()), np.append(got[~rare], got[rare].sum())
    keep = want > 0
    return float((((got - want)[keep]) ** 2 / want[keep]).sum() / (keep.sum() - 1)), drafted / total


ENUMERATED = [name for name in CHANGES if name not in ("none", "all and cut")]


@pytest.mark.parametrize("schedule", [Schedule("fused", levels=(0, 1)), Schedule("two_pass")], ids=lambda s: s.kind)
def test_lossless_is_distributed_as_processed_p(small, small_logits, schedule):
    params = SamplingParams(**CHANGES["all"])
    expected = exact(params, small_logits)
    assert sum(expected.values()) == pytest.approx(1.0)
    statistic, drafted = chi_square(small, params, schedule, 8192, expected)
    assert statistic < 1.6
    assert drafted > 0.3, "drafts must take part"


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["lossless", "coupled"])
@pytest.mark.parametrize("schedule", [Schedule("fused", levels=(0, 1)), Schedule("two_pass")], ids=lambda s: s.kind)
@pytest.mark.parametrize("name", ENUMERATED)
def test_every_parameter_by_100_000_samples(small, small_logits, schedule, name, sampler):
    params = SamplingParams(sampler, **CHANGES[name])
    statistic, drafted = chi_square(small, params, schedule, 102_400, exact(params, small_logits))
    assert statistic < 1.6
    assert drafted > 0.3


def test_the_check_sees_rows_that_do_not_follow_their_drafts(small, small_logits, monkeypatch):
    """Every verify row is adjusted as if no draft had been accepted."""
    monkeypatch.setattr(Adjustment, "along", lambda self, logits_SRV, _: torch.stack(
        [self.adjusted(self.start(logits_SRV.shape[-1]), row_SV) for row_SV in logits_SRV.unbind(1)], 1))  # fmt: skip
    params = SamplingParams(presence_penalty=1.5, repetition_penalty=1.7)
    statistic, _ = chi_square(small, params, Schedule("fused", levels=(0, 1)), 4096, exact(params, small_logits))
    assert statistic > 3


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
