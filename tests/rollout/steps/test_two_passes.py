"""The two passes of a `two_pass` step, as one call and one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from blockroll.model.backends.packed import backend
from blockroll.model.backends.packed.backend import PackedBackend
from blockroll.model.policy import Policy
from blockroll.rollout.engine import Engine
from blockroll.rollout.machine import torch_threads
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.steps.model_runner import ModelRunner
from blockroll.rollout.steps.runner import SamplerVerifier
from blockroll.rollout.types import RolloutRequest, SamplingParams


def with_markov(policy: Policy) -> Policy:
    policy.add_markov(4, torch.Generator().manual_seed(0))
    assert policy.markov is not None
    for weight in policy.markov.parameters():
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(1)).requires_grad_(False)
    return policy


@pytest.mark.parametrize("sampler", ["lossless", "coupled", "mixed"])
@pytest.mark.parametrize("records", [False, True])
def test_samples_are_the_same(make_policy, monkeypatch: pytest.MonkeyPatch, sampler: str, records: bool) -> None:
    """Samples that come and go, with prompts that take several steps, and the last steps, in which drafts are few. With two
    threads, and with a sliding window."""
    policy = with_markov(make_policy(
        torch.float32, seed=4, layer_types=["hybrid", "hybrid_sliding"], num_hidden_layers=2, sliding_window=4
    ))  # fmt: skip
    calls, run = [], ModelRunner.run_twice
    monkeypatch.setattr(ModelRunner, "run_twice", lambda *arguments: (calls.append(arguments[-1]), run(*arguments))[1])
    monkeypatch.setattr(backend, "_LEAST_ROWS", 2)
    asked = [
        RolloutRequest(f"{n}", (5,) * (1 + 3 * n), SamplingParams(
            sampler, max_tokens=4 + 5 * n, ignore_eos=True, routed_experts=records and n != 2), n, 2)
        for n in range(5)
    ]  # fmt: skip
    made = []
    for threads, between in ((1, True), (2, True), (1, False)):
        calls.clear()
        if not between:
            monkeypatch.setattr(PackedBackend, "drafts_between", False)
        with torch_threads(threads):
            made.append(Engine(policy, schedule=Schedule("two_pass", 6), max_batch=4, prefill_rows=5).rollout(asked))
        assert bool(calls) == between and all((call is None) == (sampler == "coupled") for call in calls)
    for found in made[:2]:
        for one, other in zip(found, made[2], strict=True):
            assert one.tokens == other.tokens and one.trace == other.trace
            assert np.array_equal(one.logprobs, other.logprobs)
            assert np.array_equal(one.behavior_logprobs, other.behavior_logprobs)
            assert (one.routed_experts is None) == (not records or one.request_id == "2")
            assert one.routed_experts is None or np.array_equal(one.routed_experts, other.routed_experts)


@pytest.mark.parametrize("samplers", [("lossless", "ar", "coupled"), ("lossless", "mixed")])
def test_batches_of_several_samplers_take_passes_one_by_one(make_policy, monkeypatch: pytest.MonkeyPatch, samplers) -> None:
    """Each sample is what it is alone, where both passes are one call."""
    policy = with_markov(make_policy(torch.float32, seed=4))
    asked = [RolloutRequest(name, (5, 6), SamplingParams(name, max_tokens=20, ignore_eos=True), 7) for name in samplers]
    alone = [Engine(policy, schedule=Schedule("two_pass", 6)).rollout([each])[0] for each in asked]
    monkeypatch.setattr(ModelRunner, "run_twice", None)
    for one, other in zip(alone, Engine(policy, schedule=Schedule("two_pass", 6)).rollout(asked), strict=True):
        assert one.tokens == other.tokens and np.array_equal(one.logprobs, other.logprobs)


def test_another_verifier_is_asked(make_policy) -> None:
    """Its verdict counts, where drafts are drawn between the passes too."""

    class TakesNone(SamplerVerifier):
        def __call__(self, *arguments):
            asked.append(arguments)
            verdict = super().__call__(*arguments)
            verdict.accepted_S.zero_()
            return verdict

    asked: list[object] = []
    engine = Engine(with_markov(make_policy(torch.float32, sharpness=0.6)), schedule=Schedule("two_pass", 6))
    engine.runner.verifier = TakesNone()
    (sample,) = engine.rollout([RolloutRequest("r", (5, 6), SamplingParams("lossless", max_tokens=7, ignore_eos=True))])
    assert len(asked) == 7 and not sample.from_draft.any()


def test_threads_that_share_steps_change_no_sample() -> None:
    """Of a batch that is full for a while, with the shipped policy: hundreds of steps that two threads share."""
    asked = [
        RolloutRequest(f"{n}", (5 + n % 40,) * (3 + n % 20), SamplingParams("lossless", max_tokens=60, ignore_eos=True), n)
        for n in range(40)
    ]
    made = []
    for threads in (1, 2):
        with torch_threads(threads):
            made.append(Engine("tiny-reasoner", schedule=Schedule("two_pass", 8), max_batch=8).rollout(asked))
    for one, other in zip(*made, strict=True):
        assert one.tokens == other.tokens and one.trace == other.trace and np.array_equal(one.logprobs, other.logprobs)
