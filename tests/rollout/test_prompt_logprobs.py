"""`prompt_logprobs`: the numbers of `score` under the weights that serve, with bounded logits and no second backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blockroll.model import vocabulary
from blockroll.model.backends.packed.backend import PackedBackend
from blockroll.model.backends.plain import PlainBackend
from blockroll.model.checkpoint import load_policy
from blockroll.model.scoring import score
from blockroll.rollout import prompt_logprobs
from blockroll.rollout.engine import Engine
from blockroll.rollout.types import RolloutRequest, SamplingParams

PROMPT = tuple(np.random.default_rng(0).integers(5, 40, 60).tolist())


def serve(engine, temperature=1.0, **params):
    params = SamplingParams("ar", temperature, max_tokens=2, ignore_eos=True, **params)
    return engine.rollout([RolloutRequest("a", PROMPT, params, samples=2)])


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_the_head_sees_a_bounded_number_of_prompt_rows_and_no_weights_are_folded(make_policy, monkeypatch, kind):
    policy = make_policy(torch.float64, sharpness=0.6) if kind == "plain" else load_policy("tiny-reasoner")
    engine, backend = Engine(policy, schedule="ar"), PlainBackend if kind == "plain" else PackedBackend
    (whole, _) = serve(engine, prompt_logprobs=3)
    monkeypatch.setitem(vocabulary.HEAD_BYTES, "cpu", 4 * prompt_logprobs._COPIES * policy.config.vocab_size * 7)
    made, seen = [], []
    make, head = backend.__init__, backend.head
    monkeypatch.setattr(backend, "__init__", lambda self, *rest: (made.append(self), make(self, *rest))[1])
    monkeypatch.setattr(engine.runner.model.backend, "head", lambda x, *out: (seen.append(len(x)), head(
        engine.runner.model.backend, x))[1], raising=False)  # fmt: skip
    (parts, _) = serve(engine, prompt_logprobs=3)
    assert not made
    assert sum(seen) >= 59
    assert max(seen) == 7
    np.testing.assert_allclose(parts.prompt_logprobs, whole.prompt_logprobs, atol=1e-6)
    assert np.array_equal(parts.prompt_top_tokens, whole.prompt_top_tokens)


@pytest.mark.parametrize(("temperature", "k"), [(0.0, 0), (0.0, 2), (0.7, 0), (1.0, 3)])
def test_they_have_the_bits_of_scoring_under_the_weights_that_serve(temperature, k):
    policy = load_policy("tiny-reasoner")
    engine = Engine(policy, schedule="fused")
    for version in (0, 1):
        if version:
            change = {name: x * 1.03 for name, x in policy.state_dict().items() if name != "lm_head.weight"}
            engine.load_weights(change, version)
        (sample, _) = serve(engine, temperature, prompt_logprobs=k)
        expected = score(policy, [(PROMPT[:1], PROMPT[1:])], temperature)[0]
        assert np.array_equal(sample.prompt_logprobs, expected)
        assert sample.prompt_top_tokens.shape == sample.prompt_top_logprobs.shape == (59, k)
        same = sample.prompt_top_tokens == np.array(PROMPT[1:])[:, None]
        rows = np.nonzero(same)[0]
        assert np.array_equal(sample.prompt_top_logprobs[same], expected[rows])
