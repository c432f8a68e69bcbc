"""`Policy.logprobs`: what the engine recorded, with gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import blockroll
from blockroll.errors import RequestError
from blockroll.model import logprobs as module
from blockroll.model.scoring import score
from blockroll.rollout.engine import Engine
from blockroll.rollout.types import SamplingParams


@pytest.fixture(scope="module")
def samples():
    policy = blockroll.load_policy("tiny-reasoner")
    params = SamplingParams(temperature=0.7, max_tokens=40, n=3, seed=2)
    outputs = Engine(policy).generate(["Q:47+85-12\nS:", "Q:gcd 75 12\nS:"], params)
    return [sample.trajectory for output in outputs for sample in output.samples]


def of(policy, samples, temperature=0.7):
    return policy.logprobs([s.prompt_tokens for s in samples], [s.tokens for s in samples], temperature)


def test_they_are_what_the_engine_recorded(samples):
    policy = blockroll.load_policy("tiny-reasoner")
    scored = score(policy, [(s.prompt_tokens, s.tokens) for s in samples], 0.7)
    for found, expected, sample in zip(of(policy, samples), scored, samples, strict=True):
        assert found.numpy().tobytes() == expected.tobytes() == sample.logprobs.tobytes()
    policy.requires_grad_(True)
    with torch.no_grad():
        assert all(not found.requires_grad for found in of(policy, samples))
    for found, sample in zip(of(policy, samples), samples, strict=True):
        assert found.requires_grad
        np.testing.assert_allclose(found.detach().numpy(), sample.logprobs, atol=1e-4)


def test_gradients_are_those_of_the_whole_logits(make_policy, monkeypatch):
    policy = make_policy(sharpness=0.6).requires_grad_(True)
    prompts, tokens = [[5, 6, 7], [8]], [[9, 10], [11, 12, 13, 14]]
    total = torch.zeros((), dtype=torch.float64)
    for prompt, made in zip(prompts, tokens, strict=True):
        from blockroll.model.layout import causal

        logits = policy.head(policy(causal([[*prompt, *made]])))[len(prompt) - 1 : -1]
        total = total + (logits / 0.5).log_softmax(-1).gather(1, torch.tensor(made)[:, None]).sum()
    expected = torch.autograd.grad(total, [p for p in policy.parameters()], allow_unused=True)
    monkeypatch.setattr(module, "rows_at_once", lambda *_: 4)
    found = torch.cat(policy.logprobs(prompts, tokens, 0.5)).sum()
    assert found.item() == pytest.approx(total.item(), abs=1e-5)
    for a, b in zip(torch.autograd.grad(found, [p for p in policy.parameters()], allow_unused=True), expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_what_is_refused(make_policy):
    for gradients in (False, True):
        policy = make_policy().requires_grad_(gradients)
        assert policy.logprobs([], []) == []
        assert [len(x) for x in policy.logprobs([[1], [2]], [[], [3]])] == [0, 1]
        for prompts, tokens, text in (([[1]], [], "tokens: 0 samples for 1 prompts"), ([[]], [[1]], "prompt_tokens: sequence 0"),
                                      ([[1]], [[40]], "tokens: sequence 0 holds a token outside")):  # fmt: skip
            with pytest.raises(RequestError, match=f"^{text}"):
                policy.logprobs(prompts, tokens)
