"""The contract of backends: each gives what the plain one gives, over the same layouts and caches."""

from __future__ import annotations

from contextlib import nullcontext
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from blockroll.errors import CheckpointError
from blockroll.kernels.dispatch import using
from blockroll.model.backends import Backend, choose
from blockroll.model.backends.packed import backend as packed
from blockroll.model.backends.packed.backend import PackedBackend
from blockroll.model.backends.plain import PlainBackend
from blockroll.model.backends.triton import TritonBackend
from blockroll.model.layout import DecodeRows, TokenLayout, causal, decode
from blockroll.model.policy import Routing
from blockroll.rollout.cache import PagedCache

SMALL = dict(head_dim=16, moe_intermediate_size=16, num_hidden_layers=2, layer_types=["hybrid", "hybrid_sliding"])
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
BACKENDS = [
    pytest.param(PackedBackend, {}, id="packed"),
    pytest.param(PackedBackend, {"attention_bias": True}, id="packed with biases"),
    pytest.param(PackedBackend, {"cca_time0": 3}, id="packed with more hops"),
    pytest.param(TritonBackend, SMALL, id="triton", marks=needs_triton),
]


def steps():
    """Prefill of three sequences of different lengths, of which one drafts, a step of `fused` with gaps, one of `ar`, one where
    all draft, and a single row."""
    rows = np.random.default_rng(0)

    def tokens(count):
        return rows.integers(0, 40, count).tolist()

    yield [DecodeRows(tokens(n), 0, (n,) * (n == 9), 6) for n in (1, 9, 30)]
    yield [DecodeRows(tokens(4), 1, (1, 3), 5), DecodeRows(tokens(1), 9, (1,), 5), DecodeRows(tokens(3), 30, (), 0)]
    yield [DecodeRows(tokens(1), start, (), 0) for start in (4, 10, 33)]
    yield [DecodeRows(tokens(2), start, (1,), 4) for start in (5, 11, 34)]
    yield [DecodeRows(tokens(1), 6, (), 0)]


def on(kind: type):
    """Where kernels run without an accelerator."""
    return using("triton") if kind is TritonBackend else nullcontext()


def run(backend: Backend, layout: TokenLayout, *state) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Hidden states, logits and experts."""
    routing = Routing([], [])
    hidden = backend.forward(*backend.prepare(layout, *state), *state, routing=routing)
    logits = backend.head(hidden)
    out = torch.full_like(logits, torch.nan)
    assert backend.head(hidden, out) is out and torch.equal(out, logits)
    return hidden, logits, routing.expert_LT


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind, changes", BACKENDS)
@torch.inference_mode()
def test_over_a_cache(make_policy, monkeypatch, kind, changes, threads):
    """The packed backend also with its passes divided among threads."""
    if threads > 1:
        if kind is not PackedBackend:
            pytest.skip("leaves threads to torch")
        monkeypatch.setattr(packed, "_LEAST_ROWS", 1)
    policy = make_policy(torch.float32, seed=4, **changes)
    caches = [PagedCache(policy, 24, 4, 3, 8) for _ in range(2)]
    held = [[cache.open() for _ in range(3)] for cache in caches]
    experts: set[int] = set()
    for plans in steps():
        layout, results = decode(plans, policy.mask_token_id), []
        other = kind(policy)
        if threads > 1:
            other.threads = threads
        for cache, mine, backend in zip(caches, held, (PlainBackend(policy), other), strict=True):
            for sequence, plan in zip(mine, plans, strict=False):
                assert cache.reserve(sequence, plan.start + len(plan.clean))
            with on(type(backend)):
                results.append(run(backend, layout, cache.view(mine[: len(plans)], layout)))
        for got, expected in zip(results[1][:2], results[0][:2], strict=True):
            close(got, expected)
        for got, expected in zip(results[1][2], results[0][2], strict=True):
            assert torch.equal(got, expected)
            experts |= set(expected.tolist())
        for name in ("k", "v", "x", "delayed"):
            assert torch.allclose(getattr(caches[0], name), getattr(caches[1], name), atol=1e-4, rtol=1e-4), name
    assert experts == {0, 1, 2, 3}, "every expert and the skip expert"


@pytest.mark.parametrize("kind, changes", BACKENDS)
@torch.inference_mode()
def test_without_a_cache_and_after_a_change_of_weights(make_policy, kind, changes):
    """Logits and the Markov head; `refresh` takes the new weights."""
    policy = make_policy(torch.float32, seed=4, **changes)
    policy.add_markov(3, torch.Generator().manual_seed(0))
    policy.markov.next.weight.normal_(generator=torch.Generator().manual_seed(1))
    layout, previous = causal([list(range(4, 24)), [5, 6, 7], [8]]), torch.arange(40).view(2, -1)
    with on(kind):
        backend = kind(policy)
        before = run(backend, layout)[1]
        close(before, policy.head(policy(layout)))
        for parameter in policy.parameters():
            parameter.mul_(1.05)
        backend.refresh()
        after = run(backend, layout)[1]
    assert (after - before).abs().max() > 1e-2
    close(after, policy.head(policy(layout)))
    close(backend.markov(previous), policy.markov(previous))


@needs_triton
def test_kernels_refuse_more_heads_of_a_key_head_than_a_tile_has_rows(make_policy):
    policy = make_policy(torch.float32, num_attention_heads=65, num_key_value_heads=1)
    with using("triton"), pytest.raises(CheckpointError, match="num_attention_heads: 65 query heads share 1 key heads, .* 64"):
        choose(policy)


@needs_triton
def test_the_choice(make_policy):
    """By the policy and where it runs, also while it is trained."""
    small = make_policy(torch.float32)
    assert isinstance(choose(small), PackedBackend)
    assert type(choose(make_policy(torch.float64))) is PlainBackend
    with using("triton"):
        assert type(choose(small)) is TritonBackend
