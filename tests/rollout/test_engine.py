"""The engine: exact tokens, exact log-probabilities, and what it refuses."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from engine_cases import CUTS, MODES, SCHEDULES, cut_requests, prompt, tokens_of_ar

from blockroll.errors import RequestError
from blockroll.kernels.dispatch import batch_invariant, using
from blockroll.model.checkpoint import load_policy
from blockroll.model.layout import CLEAN, causal, diffusion
from blockroll.model.policy import Routing
from blockroll.model.scoring import score
from blockroll.model.tasks import make_tasks
from blockroll.model.tokenizer import encode_prompt
from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.sampling import processing
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.steps.model_runner import ModelRunner
from blockroll.rollout.types import RolloutRequest, SamplingParams


def requests(sampler, count=12, **params):
    """Groups of two; cut-offs change from request to request."""
    return cut_requests(sampler, count, 2, **params)


@pytest.fixture(scope="module")
def policy(make_policy):
    """float64: a test of tokens must not depend on the order of a sum."""
    return make_policy(sharpness=0.6)


@pytest.fixture(scope="module")
def reference(policy):
    return tokens_of_ar(policy, lambda temperature: requests("ar", temperature=temperature))


def test_the_reference_is_worth_comparing_with(reference):
    """Samples of a group differ, and so do samples at two temperatures: the policy is neither flat nor one token."""
    hot = reference[1.0]
    assert sum(a != b for a, b in zip(hot[::2], hot[1::2], strict=True)) >= 10
    assert sum(a != b for a, b in zip(hot, reference[0.7], strict=True)) >= 20
    assert len({token for tokens in hot for token in tokens}) > 25


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block_size", [4, 8, 16])
def test_coupled_gives_the_tokens_of_ar(policy, reference, block_size, mode):
    """24 (prompt, seed) pairs, temperatures in turn. A batch runs every schedule with every block size. The other modes run a
    third of the schedules with each. One sample at a time takes longest, and has no neighbours to vary: it runs half of the
    pairs, with every cut-off."""
    pairs = 12 if mode == "alone" else 24
    for number, schedule in enumerate(SCHEDULES):
        if mode != "batch" and number % 3 != {4: 0, 8: 1, 16: 2}[block_size]:
            continue
        temperature = (0.0, 0.7, 1.0)[(number // 3 + block_size) % 3]
        engine = Engine(policy, EngineConfig(schedule, block_size=block_size, **MODES[mode]))
        tokens = [s.tokens for s in engine.rollout(requests("coupled", pairs // 2, temperature=temperature))]
        assert tokens == reference[temperature][:pairs], (schedule, temperature)
        assert engine.cache.free_pages == engine.cache.total_pages
        assert (engine.scheduler.preemptions > 0) == (mode == "preempted")


def test_coupled_inside_a_mixed_batch(policy, reference):
    """Neighbours with other samplers change nothing."""
    others = [
        RolloutRequest(f"x{i}{name}", prompt(i + 50), SamplingParams(sampler=name, max_tokens=30), i)
        for i, name in itertools.product(range(4), ("ar", "lossless", "mixed"))
    ]
    mine = requests("coupled", temperature=1.0)
    mingled = [r for pair in itertools.zip_longest(others, mine) for r in pair if r is not None]
    done = Engine(policy, EngineConfig(max_batch=9)).rollout(mingled)
    assert [s.tokens for s in done if s.request_id.startswith("r")] == reference[1.0]


def test_lossless_does_not_notice_preemption(policy):
    """Drafts outlive preemption, so the tokens stay the same under a fixed schedule."""
    runs = []
    for mode in ("batch", "preempted"):
        runs.append(Engine(policy, EngineConfig(**MODES[mode])).rollout(requests("lossless")))
    assert [s.tokens for s in runs[0]] == [s.tokens for s in runs[1]]


@pytest.mark.parametrize("sampler", ["ar", "lossless", "coupled", "mixed"])
@pytest.mark.parametrize("schedule", [Schedule("fused", levels=(0, 3)), Schedule("two_pass")], ids=lambda s: s.kind)
def test_logprobs_are_those_of_one_causal_pass(make_policy, sampler, schedule):
    policy = make_policy(torch.float32, sharpness=0.6)
    for temperature in (0.0, 0.7, 1.0):
        samples = Engine(policy, EngineConfig(schedule, block_size=8)).rollout(
            requests(sampler, temperature=temperature)
        )
        scores = score(policy, [(s.prompt_tokens, s.tokens) for s in samples], temperature)
        for sample, expected in zip(samples, scores, strict=True):
            assert np.abs(sample.logprobs - expected).max() <= 1e-5
            behavior = recompute_behavior(policy, sample, CUTS[int(sample.request_id[1:]) % 4], sampler, temperature)
            assert np.abs(sample.behavior_logprobs - behavior).max() <= 2e-5


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="products of other libraries may add in another order")
@pytest.mark.parametrize("sampler", ["ar", "lossless", "coupled", "mixed"])
def test_logprobs_of_the_shipped_policy_are_those_of_scoring_to_the_last_bit(sampler):
    """Whatever the schedule, the batch, the chunks of the prompt and the cut-offs, preempted or not."""
    policy = load_policy("tiny-reasoner")
    prompts = [tuple(encode_prompt(policy.tokenizer, task.prompt)) for task in make_tasks("heldout", 6)]
    for temperature, schedule, mode in zip((1.0, 0.7, 1.0), ("fused", "fused", "two_pass"), MODES.values(), strict=True):
        asked = [
            RolloutRequest(f"r{i}", prompt, SamplingParams(sampler, temperature, max_tokens=40, **CUTS[i % 4]), i, 2)
            for i, prompt in enumerate(prompts)
        ]
        samples = Engine(policy, EngineConfig(Schedule(schedule), **{**mode, "pages": 60})).rollout(asked)
        scores = score(policy, [(s.prompt_tokens, s.tokens) for s in samples], temperature)
        for sample, expected in zip(samples, scores, strict=True):
            assert np.array_equal(sample.logprobs, expected)


@torch.no_grad()
def recompute_behavior(policy, sample, cuts, sampler, temperature):
    """log-probability of each token under what it was sampled from, from whole-sequence passes and the decode trace."""
    start, text = len(sample.prompt_tokens), [*sample.prompt_tokens, *sample.tokens]
    p = policy.head(policy(causal([text])))[start - 1 : -1]
    target = p.clone()
    if sampler == "mixed":
        steps = [step for step in sample.trace if step.drafted]
        blocks = [(step.draft_start, step.draft_length) for step in steps]
        layout, _ = diffusion([text], [blocks], policy.mask_token_id)
        q = policy.head(policy(layout)[layout.block_T != CLEAN])
        q[:, policy.mask_token_id] = -torch.inf
        offsets = np.cumsum([0, *(length for _, length in blocks)])
        for step, offset in zip(steps, offsets, strict=False):
            for position in range(step.anchor + 1, min(step.anchor + 1 + step.drafted, len(text))):
                if position - step.anchor <= step.accepted + 1:
                    row = q[offset + position - step.draft_start]
                    target[position - start] = 0.5 * p[position - start] + 0.5 * row
    n = len(sample.tokens)
    full = dict(top_k=0, top_p=1.0, min_p=0.0) | cuts
    params = {name: torch.full((n,), value) for name, value in full.items()}
    logp = processing.process(target, torch.full((n,), temperature), **params)
    return logp.gather(1, torch.tensor(sample.tokens)[:, None])[:, 0].numpy()


def test_routed_experts_are_those_of_one_causal_pass(policy):
    params = SamplingParams(sampler="coupled", max_tokens=20, routed_experts=True)
    for sample in Engine(policy, EngineConfig(max_batch=3, prefill_rows=4)).rollout(
        [RolloutRequest(f"e{i}", prompt(i), params, i) for i in range(6)]
    ):
        routing = Routing([], [])
        with torch.no_grad():
            policy(causal([[*sample.prompt_tokens, *sample.tokens][:-1]]), routing=routing)
        assert np.array_equal(sample.routed_experts, torch.stack(routing.expert_LT, dim=1).numpy())


def test_stop_tokens_and_limits(policy):
    free = Engine(policy).rollout(
        [RolloutRequest("a", prompt(3), SamplingParams(sampler="coupled", max_tokens=40, ignore_eos=True), 5)]
    )[0]
    assert (free.finish_reason, len(free.tokens)) == ("length", 40)
    stop = free.tokens[11]
    params = SamplingParams(sampler="coupled", max_tokens=40, ignore_eos=True, stop_token_ids=(stop,))
    ended = Engine(policy).rollout([RolloutRequest("a", prompt(3), params, 5)])[0]
    assert ended.finish_reason == "stop"
    assert ended.tokens == free.tokens[: free.tokens.index(stop) + 1]
    long = SamplingParams(max_tokens=10_000, ignore_eos=True)
    assert len(Engine(policy).rollout([RolloutRequest("b", prompt(3), long)])[0].tokens) == 160 - len(prompt(3))


def rows_of_forwards(policy, config, params, samples):
    """Of one request with 35 prompt tokens."""
    engine, rows, forward = Engine(policy, config), [], policy.forward
    policy.forward = lambda layout, *args, **kw: rows.append(layout.rows) or forward(layout, *args, **kw)
    try:
        engine.rollout([RolloutRequest("g", tuple(range(4, 39)), params, samples=samples)])
    finally:
        del policy.forward
    return rows


def test_a_prompt_is_prefilled_once_for_its_group(policy):
    params = SamplingParams(sampler="ar", max_tokens=4, ignore_eos=True)
    assert sum(rows_of_forwards(policy, EngineConfig(max_batch=8, prefill_rows=64), params, 8)) == 34 + 8 * 4


def test_the_forward_that_ends_a_prompt_decodes_it(policy):
    """No forward is spent on a prompt alone, but for what is too long for one."""
    params = SamplingParams(sampler="ar", max_tokens=4, ignore_eos=True)
    assert rows_of_forwards(policy, EngineConfig(), params, 1) == [34 + 1, 1, 1, 1]
    assert rows_of_forwards(policy, EngineConfig(prefill_rows=20), params, 1) == [20, 14 + 1, 1, 1, 1]
    fused = EngineConfig(Schedule("fused", levels=(0,)), block_size=8)
    assert rows_of_forwards(policy, fused, SamplingParams("lossless", max_tokens=3, ignore_eos=True), 1)[0] == 34 + 1 + 8


@pytest.mark.parametrize("sampler", ["lossless", "coupled", "mixed"])
def test_the_first_draft_of_two_passes_is_p_s_own(policy, sampler):
    """It is accepted, unless p drew the mask token. `mixed` has another target than p."""
    asked = [RolloutRequest(f"{i}", prompt(i), SamplingParams(sampler, max_tokens=22), i, 2) for i in range(12)]
    samples = Engine(policy, EngineConfig(Schedule("two_pass"))).rollout(asked)
    first = [
        (step.accepted, sample.tokens[step.anchor + 1 - len(sample.prompt_tokens)])
        for sample in samples for step in sample.trace if step.drafted
    ]  # fmt: skip
    rejected = [token for accepted, token in first if not accepted]
    assert len(first) > 50
    if sampler == "mixed":
        assert set(rejected) - {policy.mask_token_id}
    else:
        assert set(rejected) <= {policy.mask_token_id} and len(rejected) < len(first) / 4


def test_weights_change_between_two_steps(policy, make_policy):
    other = make_policy(seed=9, sharpness=0.6)
    mine = make_policy(sharpness=0.6)
    engine = Engine(mine)
    engine.add(RolloutRequest("w", prompt(1), SamplingParams(max_tokens=60, ignore_eos=True)))
    engine.step()
    engine.step()
    engine.load_weights(other.state_dict(), 1, in_flight="recompute")
    done = []
    while engine.has_work:
        done += engine.step()
    versions = done[0].versions
    assert versions[0] == 0
    assert versions[-1] == 1
    assert (np.diff(versions) >= 0).all()
    changed = int((versions == 0).sum())
    expected = score(other, [(done[0].prompt_tokens, done[0].tokens)])[0]
    assert np.abs(done[0].logprobs - expected)[changed:].max() < 1e-5


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (RolloutRequest("x", (5,) * 160), "prompt_tokens"),
        (RolloutRequest("x", (5, 40)), "prompt_tokens"),
        (RolloutRequest("x", (5,) * 60, SamplingParams(max_tokens=99)), "max_tokens"),
    ],
)
def test_what_cannot_be_served_is_refused(policy, request_, field):
    with pytest.raises(RequestError, match=field):
        Engine(policy, EngineConfig(pages=4, page_size=16)).add(request_)


def test_bad_parameters_name_their_field():
    for field, value in dict(sampler="best", temperature=-1, top_p=0.0, top_k=-2, min_p=1.0, mix_weight=2).items():
        with pytest.raises(RequestError, match=field):
            SamplingParams(**{field: value})
    with pytest.raises(RequestError, match="schedule"):
        Schedule("fastest")


def test_minus_one_keeps_every_token_as_in_other_engines(policy):
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)
    samples = [
        Engine(policy).rollout([RolloutRequest("a", prompt(3), SamplingParams("coupled", top_k=k, max_tokens=20))])[0]
        for k in (-1, 0)
    ]
    assert samples[0].tokens == samples[1].tokens
    assert samples[0].support_logmass is None


def test_batch_invariance_is_a_setting(monkeypatch) -> None:
    """In force within steps and nowhere else; a caller's own choice stays."""
    real, seen = ModelRunner.run, []

    def noted(self, *arguments):
        seen.append(batch_invariant())
        return real(self, *arguments)

    monkeypatch.setattr(ModelRunner, "run", noted)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    for setting, around, expected in ((False, None, False), (True, None, True), (False, True, True)):
        seen.clear()
        with using(batch_invariant=around):
            engine = Engine("tiny-reasoner", device="cpu", schedule="ar", batch_invariant=setting)
            engine.generate([[3, 4]], params)
        assert {*seen} == {expected} and not batch_invariant()
