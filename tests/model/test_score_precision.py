"""Attention of float32 rows on a CPU is as exact for large scores as for small ones, for the engine and for the trainer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blockroll.kernels.attention import LongPack, RowRanges, attend
from blockroll.model.backends.packed.attention import Lines, lines_of, width_of
from blockroll.model.backends.packed.attention import attend as attend_packed
from blockroll.model.backends.packed.plan import PackedPlan
from blockroll.model.layout import causal

ROWS, HEADS, KV_HEADS, SIZE = 96, 4, 2, 32


def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q_THD, k_TGD, v_TGD: scores of about 100 that differ by about 3, so that many keys take part."""
    draw = torch.Generator().manual_seed(0)
    one_D = torch.randn(SIZE, generator=draw)
    q, k, v = (torch.randn(ROWS, heads, SIZE, generator=draw) for heads in (HEADS, KV_HEADS, KV_HEADS))
    q, k = (one_D + 0.2 * x for x in (q, k))
    return *(x / x.norm(dim=-1, keepdim=True) * 10 for x in (q, k)), v


def padded(q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor) -> torch.Tensor:
    return attend(q_THD[None], k_TGD[None], v_TGD[None], torch.ones(1, ROWS, ROWS, dtype=torch.bool).tril(), 1.0)[0]


def flat(q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor) -> torch.Tensor:
    end_T = torch.arange(1, ROWS + 1)
    ranges = RowRanges(torch.stack([torch.zeros_like(end_T), end_T, *[torch.zeros_like(end_T)] * 2]))
    return LongPack.of(ranges).attend(q_THD, k_TGD, v_TGD, 1.0)


def engine(q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor) -> torch.Tensor:
    lines = Lines.of(1, HEADS // KV_HEADS, KV_HEADS, SIZE, width_of(ROWS), lambda _, *shape: np.zeros(shape, np.float32))
    plan, out_THD = PackedPlan.of(causal([[0] * ROWS]), None, 2, {"hybrid": None}), np.empty((ROWS, HEADS, SIZE), np.float32)
    q, k, v = (x.numpy() for x in (q_THD, k_TGD, v_TGD))
    attend_packed(0, 1, plan, 0, q, k, v, k, v, lines_of(lines, 0), out_THD)
    return torch.from_numpy(out_THD)


@pytest.mark.parametrize("attention", [padded, flat, engine])
def test_large_scores_are_not_rounded_to_float32(attention) -> None:
    """Scores rounded to float32 give 1.4e-5 here; the values are near 1, so rounding their weighted sum alone gives 1e-7."""
    q, k, v = rows()
    exact = padded(q.double(), k.double(), v.double())
    found = attention(q, k, v)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 5e-7
