"""The whole network on Triton's kernels (interpreted): the logits of torch, alone or in a batch, with a cache or without."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from blockroll.kernels.dispatch import using
from blockroll.model.layout import DecodeRows, causal, decode, diffusion
from blockroll.rollout.cache import PagedCache

SMALL = dict(head_dim=16, moe_intermediate_size=16, num_hidden_layers=2, layer_types=["hybrid", "hybrid_sliding"])


@pytest.fixture(scope="module")
def policy(make_policy):
    return make_policy(torch.float32, **SMALL)


class Run:
    """A policy with a cache: prompts of any length, then decode steps."""

    def __init__(self, policy, sequences: int) -> None:
        self.policy, self.cache = policy, PagedCache(policy, 16 * sequences, 8, sequences, decode_rows=5)
        self.held = [self.cache.open() for _ in range(sequences)]

    @torch.no_grad()
    def __call__(self, implementation: str, plans: list[DecodeRows], invariant: bool = False) -> torch.Tensor:
        """Logits of the step; the clean rows of every sequence are kept."""
        for held, plan in zip(self.held, plans, strict=True):
            assert held.length == plan.start and self.cache.reserve(held, plan.start + 40)
        layout = decode(plans, self.policy.mask_token_id)
        with using(implementation, batch_invariant=invariant):
            logits = self.policy.head(self.policy(layout, self.cache.view(self.held, layout)))
        for held, plan in zip(self.held, plans, strict=True):
            held.length += len(plan.clean)
        return logits


def steps(prompt: int, drafts: int, proposals: tuple[int, ...], seed: int = 0) -> list[DecodeRows]:
    """A prompt in two chunks, then two decode steps; the sliding window is shorter than the whole."""
    token = torch.randint(3, 40, (99,), generator=torch.Generator().manual_seed(seed)).tolist()
    half, done = prompt // 2, prompt + 1 + drafts
    return [
        DecodeRows(token[:half], 0, (), 4),
        DecodeRows(token[half:prompt], half, (), 4),
        DecodeRows(token[prompt:done], prompt, proposals, 4),
        DecodeRows(token[done : done + 1], done, (1,), 4),
    ]


PACK = [steps(30, 2, (1, 3)), steps(7, 0, (), seed=1), steps(19, 3, (1,), seed=2)]


def test_prefill_and_decode_through_the_cache(policy) -> None:
    by_triton, by_torch = Run(policy, len(PACK)), Run(policy, len(PACK))
    for step in zip(*PACK, strict=True):
        torch.testing.assert_close(
            by_triton("triton", list(step)), by_torch("reference", list(step)), atol=2e-5, rtol=2e-5
        )


def test_packs_without_a_cache(policy) -> None:
    document = list(range(3, 33))
    training, _ = diffusion([document, document[:7]], [[(4, 5), (12, 3)], [(2, 6)]], policy.mask_token_id)
    for layout in (causal([document, document[:9]]), training):
        with torch.no_grad():
            expected = policy(layout)
            with using("triton"):
                got = policy(layout)
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


def test_a_sequence_alone_equals_it_among_64(make_policy) -> None:
    """batch_invariant, bit for bit: every logit of its rows, over a past of random keys, values and tails."""
    policy = make_policy(torch.float32, **{**SMALL, "num_hidden_layers": 1, "layer_types": ["hybrid"]})
    # So long a past is cut into three shares alone and into two among so many, where that is free.
    plans = [DecodeRows([5, 6, 7], 440, (1, 3), 4)]
    plans += [DecodeRows([3 + i % 30] * (1 + i % 2), i, (1,) if i % 9 == 0 else (), 4) for i in range(1, 64)]
    together = Run(policy, 64)
    for held, plan in zip(together.held, plans, strict=True):
        held.length = plan.start
    for number, pool in enumerate((together.cache.k, together.cache.v, together.cache.x, together.cache.delayed)):
        pool.normal_(generator=torch.Generator().manual_seed(number))
    alone = Run(policy, 1)
    alone.cache, alone.held = together.cache, together.held[:1]
    among = together("triton", plans, invariant=True)
    together.held[0].length = plans[0].start
    assert torch.equal(alone("triton", plans[:1], invariant=True), among[:11])


def test_packed_projections_are_the_same_parameters(make_policy) -> None:
    policy, other = (make_policy(torch.float32, seed=seed, **SMALL, attention_bias=True) for seed in (0, 1))
    layout = causal([list(range(3, 8))])
    state = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    with torch.no_grad():
        expected, expected_other = policy(layout), other(layout)
        close = dict(atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(policy.pack()(layout), expected, **close)
        assert all(torch.equal(tensor, state[name]) for name, tensor in policy.state_dict().items())
        where = [parameter.data_ptr() for parameter in policy.parameters()]
        # Another engine on the same policy packs it again: what an earlier one captured still reads here.
        assert [parameter.data_ptr() for parameter in policy.pack().parameters()] == where
        with using("triton"):
            torch.testing.assert_close(policy(layout), expected, **close)
        policy.load_state_dict(other.state_dict())
        torch.testing.assert_close(policy(layout), expected_other, **close)
        torch.testing.assert_close(policy.double()(layout), other.double()(layout), atol=1e-12, rtol=1e-12)
    weight = policy.model.layers[0].self_attn.qkv_proj.q_proj.weight.requires_grad_()
    policy.pack()(layout).sum().backward()
    assert weight.grad is not None and weight.grad.any()
