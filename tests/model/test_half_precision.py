"""Log-probabilities of a bfloat16 policy: its logits are not rounded to bfloat16."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blockroll.kernels.dispatch import using
from blockroll.model.layout import causal
from blockroll.model.scoring import score
from blockroll.rollout.engine import Engine
from blockroll.rollout.types import RolloutRequest, SamplingParams


@pytest.fixture(scope="module")
def policy(make_policy):
    """Logits of about 20, where bfloat16 numbers lie 0.125 apart, over a vocabulary in which many are near each other."""
    made = make_policy(torch.float32, vocab_size=2048, layer_types=["hybrid"], num_hidden_layers=1)
    with torch.no_grad():
        made.lm_head.weight.mul_(3.0)
    for parameter in made.parameters():
        parameter.data = parameter.data.bfloat16()
    return made


def test_no_two_logits_are_equal(policy):
    """Of the best eight of each row some would be, rounded to bfloat16."""
    hidden_TD = policy(causal([list(range(3, 40))]))
    logits_TV = policy.head(hidden_TD)
    assert logits_TV.dtype == torch.float32
    exact_TV = hidden_TD.double() @ policy.lm_head.weight.double().T
    assert float((logits_TV - exact_TV).abs().max()) < 1e-4
    top_T8 = logits_TV.topk(8).values
    assert float(top_T8[:, 0].median()) > 8

    def ties(values_T8):
        return int((values_T8[:, 1:] == values_T8[:, :-1]).sum())

    assert ties(top_T8) == 0 < ties(exact_TV.bfloat16().topk(8).values)


@pytest.mark.parametrize("implementation", ["reference", "auto"])
def test_recorded_log_probabilities_are_those_of_exact_logits(policy, implementation):
    """As the engine records them and as `score` recomputes them, from the same final hidden states."""
    request = RolloutRequest("a", (3, 4, 5), SamplingParams("ar", max_tokens=12, ignore_eos=True), seed=1)
    with using(implementation):
        (sample,) = Engine(policy, schedule="ar", max_batch=1).rollout([request])
        (scored,) = score(policy, [(sample.prompt_tokens, sample.tokens)])
    hidden_TD = policy(causal([[*sample.prompt_tokens, *sample.tokens]]))[2:-1]
    logp_TV = (hidden_TD.double() @ policy.lm_head.weight.double().T).log_softmax(-1)
    exact = logp_TV.gather(1, torch.tensor(sample.tokens)[:, None])[:, 0].numpy()
    np.testing.assert_allclose(scored, exact, atol=1e-4)
    rounded = (hidden_TD @ policy.lm_head.weight.T).double().log_softmax(-1)
    rounded = rounded.gather(1, torch.tensor(sample.tokens)[:, None])[:, 0].numpy()
    assert np.abs(rounded - exact).max() > 10 * np.abs(scored - exact).max()
    np.testing.assert_allclose(sample.logprobs, exact, atol=0.05)  # its hidden states are rounded in another order
