"""The folded network computes what the network computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blockroll.kernels.compiled import compiled, exponentials
from blockroll.model.layout import CLEAN, DecodeRows, causal, decode
from blockroll.model.packed import attention, packed_forward, stages
from blockroll.model.policy import Routing
from blockroll.rollout.cache import PagedCache


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


@pytest.mark.parametrize("at_once", ["all", "one"])
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True}, {"cca_time0": 3}], ids=str)
@torch.inference_mode()
def test_packed_equals_the_network(make_policy, monkeypatch, changes, at_once):
    """With the mask rows of all sequences in one product, or of one sequence after another."""
    if at_once == "one":
        monkeypatch.setattr(attention, "_MOST_SCORES", 1)
    policy = make_policy(torch.float32, seed=4, **changes)
    packed = packed_forward(policy)
    assert packed is not None
    caches = [PagedCache(policy, 24, 4, 3, 8) for _ in range(2)]
    held = [[cache.open() for _ in range(3)] for cache in caches]
    experts = set()
    for plans in steps():
        layout = decode(plans, policy.mask_token_id)
        outs, routings = [], []
        for cache, mine, forward in zip(caches, held, (policy, packed), strict=True):
            for sequence, plan in zip(mine, plans, strict=False):
                assert cache.reserve(sequence, plan.start + len(plan.clean))
            routings.append(Routing([], []))
            outs.append(forward(layout, cache.view(mine[: len(plans)], layout), routings[-1]))
        assert (outs[0] - outs[1]).abs().max() < 2e-5 * outs[0].abs().max()
        for one, other in zip(*(routing.expert_LT for routing in routings), strict=True):
            assert torch.equal(one, other)
            experts |= set(one.tolist())
        for name in ("k", "v", "x", "delayed"):
            assert torch.allclose(getattr(caches[0], name), getattr(caches[1], name), atol=1e-4, rtol=1e-4), name
    assert experts == {0, 1, 2, 3}, "every expert and the skip expert"


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="products of other libraries may add in another order")
@pytest.mark.parametrize(
    "changes", [{"head_dim": 16}, {"head_dim": 64, "attention_bias": True}, {"head_dim": 16, "cca_time0": 3}], ids=str
)
@torch.inference_mode()
def test_a_clean_row_depends_on_its_prefix_alone(make_policy, changes):
    """To the last bit: in one pass without a cache, row by row, in chunks beside others, behind or before mask rows."""
    policy = make_policy(torch.float32, seed=4, **changes)
    packed = packed_forward(policy)
    draw = np.random.default_rng(1)
    texts = [draw.integers(0, 40, count).tolist() for count in (61, 9, 30, 2)]
    expected = [packed.head(packed(causal([text]))) for text in texts]
    together = packed.head(packed(causal(texts)))
    assert torch.equal(together, torch.cat(expected))
    plain = policy.head(policy(causal(texts)))
    assert (together - plain).abs().max() < 2e-5 * plain.abs().max()

    def run(cache, steps):
        """Steps of (sequence, rows, proposals); the logits of each clean row, by sequence."""
        held, done, got = [cache.open() for _ in texts], [0] * len(texts), [[] for _ in texts]
        for step in steps:
            plans = []
            for s, count, proposals in step:
                count = min(count, len(texts[s]) - done[s])
                plans.append(DecodeRows(texts[s][done[s] : done[s] + count], done[s], proposals, 5 if proposals else 0))
                assert cache.reserve(held[s], done[s] + count)
            layout = decode(plans, policy.mask_token_id)
            logits = packed.head(packed(layout, cache.view([held[s] for s, *_ in step], layout)))
            for number, (s, *_) in enumerate(step):
                got[s].append(logits[(layout.sequence_T == number) & (layout.block_T == CLEAN)])
                done[s] += len(got[s][-1])
        return got

    cache = PagedCache(policy, 40, 4, 4, 80)
    alone = run(cache, [[(0, 1, ())]] * 61)
    assert torch.equal(torch.cat(alone[0]), expected[0])
    cache = PagedCache(policy, 40, 4, 4, 80)
    mixed = run(cache, [
        [(2, 13, ()), (0, 30, ()), (3, 1, ())], [(2, 4, (1, 3)), (0, 1, (1,)), (1, 8, ())],
        [(3, 1, (1,)), (2, 1, ()), (0, 30, (2,))], [(2, 12, ()), (1, 1, (1,))],
    ])  # fmt: skip
    for got, logits in zip(mixed, expected, strict=True):
        assert torch.equal(torch.cat(got), logits[: sum(map(len, got))])
    assert [sum(map(len, got)) for got in mixed] == [61, 9, 30, 2]


def test_what_is_not_served(make_policy):
    assert packed_forward(make_policy(torch.float64)) is None
    assert packed_forward(make_policy(torch.bfloat16)) is None


def test_the_markov_head_as_a_table(make_policy):
    policy = make_policy(torch.float32, seed=4)
    policy.add_markov(3, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(policy.markov.next.weight)
    previous = torch.arange(policy.config.vocab_size).flip(0).view(2, -1)
    with torch.inference_mode():
        torch.testing.assert_close(packed_forward(policy).markov(previous), policy.markov(previous))


def test_functions_between_the_products():
    """exp and gelu as the stages compute them, beside torch's."""
    x = np.linspace(-86, 80, 5003, dtype=np.float32)
    got = x.copy()
    exponentials(got, len(x))
    np.testing.assert_allclose(got, np.exp(x.astype(np.float64)), rtol=3e-7)
    x = np.linspace(-9, 9, 5003, dtype=np.float32)
    got = x.copy()
    stages._gelu(got, len(x), np.empty_like(x))
    expected = torch.nn.functional.gelu(torch.from_numpy(x).double()).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-6, rtol=1e-6)


def test_what_cannot_be_kept_on_disk_is_compiled_all_the_same():
    scope = {"compiled": compiled}
    exec("@compiled()\ndef double(x):\n    return 2 * x\n", scope)
    assert scope["double"](3) == 6
