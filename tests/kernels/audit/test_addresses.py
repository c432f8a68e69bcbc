"""The largest addresses at production sizes, whose memory is not there: no offset overflows, and none leaves its tensor.

ZAYA1-8B, a K/V pool of 8M positions (4 GB in 16 bits), 262,272 tokens, 64 sequences of 17 verify rows, and 512 of them where
logits are over 2^31 numbers. Of each launch the first and the last program run, and others.
"""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from kernel_audit import Audit, vast

from blockroll.kernels.attention import Rows
from blockroll.kernels.attention.triton import paged_attend
from blockroll.kernels.cca import CCAInputs, CCAWeights, Places, Pools
from blockroll.kernels.cca.triton import cca
from blockroll.kernels.cutoffs.triton import cut_, edges
from blockroll.kernels.dispatch import using
from blockroll.kernels.experts import RouterWeights, route, route_top1
from blockroll.kernels.linear.triton import linear
from blockroll.kernels.residual import Scales, scale_residual_norm
from blockroll.kernels.shapes import ZAYA1_8B as SHAPE
from blockroll.kernels.verify.triton import sample_cdf, sample_gumbel, verify_rejection

HALF = torch.float16
"""The interpreter's bfloat16 is wrong; float16 has the same addresses."""
D, H, G, SIZE, PAGE = SHAPE.hidden, SHAPE.heads, SHAPE.kv_heads, SHAPE.head_dim, SHAPE.page_size


def audited(call, programs: int = 2, **options) -> Audit:
    """Some programs of a grid run. What the others would have written is 0, which may be read as an index."""
    with using("triton"), mock.patch.object(torch, "empty", torch.zeros), Audit(programs=programs, **options) as audit:
        call()
    return audit


def half(*shape: int) -> torch.Tensor:
    return vast(*shape, dtype=HALF)


def pools() -> tuple[torch.Tensor, torch.Tensor]:
    return half(SHAPE.large_positions, G, SIZE), half(SHAPE.large_positions, G, SIZE)


def attention(sequences: int, count: int, context: int) -> None:
    """Every sequence's pages are the last ones of the pool."""
    line, pages = np.tile(np.arange(count), sequences), -(-context // PAGE) + 1
    last = SHAPE.large_positions // PAGE
    table = torch.arange(last - pages, last, dtype=torch.int32).expand(sequences, -1).contiguous()
    rows = Rows.of(
        np.stack([0 * line, context + line + 1, 0 * line, 0 * line]), np.arange(sequences + 1) * count,
        np.full(sequences, context), table, page_size=PAGE, heads=H, kv_heads=G, dtype=HALF, batch_invariant=False,
    )  # fmt: skip
    T = sequences * count
    paged_attend(half(T, H, SIZE), half(T, G, SIZE), half(T, G, SIZE), *pools(), rows, SIZE**-0.5)


def test_attention():
    audited(lambda: attention(64, 32, 300))


@pytest.mark.parametrize("page", [32, 8, 1])
def test_attention_over_a_sequence_that_begins(page):
    """No block of keys is cached whole, and the table of pages has one column."""
    rows = Rows.of(
        np.array([[0], [2], [0], [0]]), np.array([0, 1]), np.array([1]), torch.zeros(1, 1, dtype=torch.int32), page_size=page,
        heads=H, kv_heads=G, dtype=HALF,
    )  # fmt: skip
    pools = half(page, G, SIZE), half(page, G, SIZE)
    audited(lambda: paged_attend(half(1, H, SIZE), half(1, G, SIZE), half(1, G, SIZE), *pools, rows, SIZE**-0.5))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(64, 32, 16384), (1, 32, 16384), (512, 17, 2048)])
def test_attention_over_long_contexts(sizes):
    audited(lambda: attention(*sizes), 4)


def test_cca():
    rows, width, channels = 64 * 32, G * SIZE // 2, (H + G) * SIZE
    entries = SHAPE.large_positions // PAGE * 2  # two tail entries a page
    source = torch.full((rows, 3), -2 - (entries - 1))
    source[:, 0] = torch.arange(rows)
    places = Places.of(
        source, SHAPE.large_positions - 1 - torch.arange(rows), entries - 2 - torch.arange(rows), True, "cpu"
    )
    weights = CCAWeights(
        half(channels, 1, 2), half(channels), half(channels, SIZE, 2), half(channels), half(G), None
    )
    x, current, delayed = half(rows, channels + 2 * width).split([channels, width, width], 1)
    inputs = CCAInputs(x, current, delayed, weights, half(rows, 64), half(rows, 64))
    audited(lambda: cca(inputs, places, Pools(*pools(), half(entries, channels), half(entries, width))))


def test_residual_and_router():
    rows, p, e = 4096, SHAPE.router, SHAPE.experts
    scales = Scales(*(half(D) for _ in range(4)))
    weights = RouterWeights(
        half(p, D), half(p), half(p), half(p), half(p, p), half(p), half(p, p), half(p), half(e + 1, p), torch.zeros(e + 1)
    )
    audited(lambda: scale_residual_norm(half(rows, D), vast(rows, D), scales, half(D), 1e-5))
    audited(lambda: route(half(rows, D), half(rows, p), weights, 1e-5))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [64, 4096])
def test_experts(rows):
    e, f = SHAPE.experts, SHAPE.ffn
    expert = torch.arange(rows) % e
    audited(lambda: route_top1(half(rows, D), expert, half(rows), half(e, 2 * f, D), half(e, D, f)),
            every=("_place_kernel",))


def keys(sequences: int) -> tuple[torch.Tensor, ...]:
    line = torch.arange(sequences)
    return torch.ones(sequences, dtype=torch.float64), line, line + 1000


@pytest.mark.parametrize("sequences", [pytest.param(64, marks=pytest.mark.slow), 512])
def test_samplers(sequences):
    temperature, seed, anchor = keys(sequences)
    logits = vast(sequences, 16, SHAPE.vocab)
    audited(lambda: sample_gumbel(logits, temperature, seed, anchor))
    audited(lambda: sample_cdf(logits, temperature, seed, anchor))


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [False, True])
def test_verification(mixed):
    sequences = 512
    temperature, seed, anchor = keys(sequences)
    p, q = vast(sequences, 17, SHAPE.vocab), vast(sequences, 16, SHAPE.vocab)
    lse, count = torch.full((sequences, 16), float(np.log(SHAPE.vocab)), dtype=torch.float64), torch.full((sequences,), 16)
    draft = torch.full((sequences, 16), SHAPE.vocab - 1)
    audited(lambda: verify_rejection(
        p, q, lse, draft, count, temperature, seed, anchor, 3, temperature * 0.5 if mixed else None
    ))  # fmt: skip


@pytest.mark.slow
def test_cut_offs():
    """All numbers are equal: a row's edge is looked for in the whole row."""
    sequences = 512
    logits, wide = vast(sequences, 17, SHAPE.vocab), torch.ones(sequences, dtype=torch.float64)

    def call() -> None:
        found = edges(logits, wide, torch.full((sequences,), 50), wide * 0.9, wide * 0.1)
        cut_(logits, wide, found)

    audited(call, rows=("_top_kernel", "_count_kernel", "_gather_kernel"))


@pytest.mark.slow
def test_the_head_of_a_large_batch():
    audited(lambda: linear(half(512 * 17, D), half(SHAPE.vocab, D)))
