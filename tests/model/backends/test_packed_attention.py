"""Attention on a CPU: what one sequence left in the working memory reaches no other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from blockroll.model.backends.packed.attention import Lines, attend, lines_of, width_of
from blockroll.model.backends.packed.plan import PackedPlan
from blockroll.model.layout import DecodeRows, causal, decode

HEADS, KV_HEADS, SIZE = 4, 2, 32


@pytest.mark.parametrize("rows", [15, 16, 23, 32])
@pytest.mark.parametrize("window", [None, 5, 13])
def test_values_that_are_not_finite_stay_in_their_sequence(rows: int, window: int | None) -> None:
    memory = _lines(48)

    def attended(count: int, value: float | None = None) -> np.ndarray:
        q, k, v = _rows(count)
        if value is not None:
            v[:] = value
        plan, out_THD = PackedPlan.of(causal([[0] * count]), None, 2, {"hybrid": window}), np.empty_like(q)
        attend(0, 1, plan, 0, q, k, v, k, v, memory, out_THD)
        return out_THD

    before = attended(rows)
    attended(48, float("nan"))
    assert np.array_equal(attended(rows), before)


@pytest.mark.parametrize("window", [None, 3])
def test_mask_rows_as_the_rule_says(window: int | None) -> None:
    """Three blocks of 11 rows: more queries than are computed at once. Beside torch's softmax over what `sees` tells."""
    layout = decode([DecodeRows([5] * 7, 0, (2, 4, 7), 11)], 3)
    plan, (q, k, v) = PackedPlan.of(layout, None, 2, {"hybrid": window}), _rows(layout.rows)
    out_THD = np.empty_like(q)
    attend(0, 1, plan, 0, q, k, v, k, v, _lines(layout.rows), out_THD)
    i, j = layout.position_T[:, None], layout.position_T[None]
    seen = layout.sees() & ((layout.block_T >= 0)[None] | (i - j < (window or layout.rows)))
    k_THD, v_THD = (torch.from_numpy(x).double().repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores_HTT = torch.einsum("ihd,jhd->hij", torch.from_numpy(q).double(), k_THD).masked_fill(~seen, -torch.inf)
    expected = torch.einsum("hij,jhd->ihd", scores_HTT.softmax(-1), v_THD)
    torch.testing.assert_close(torch.from_numpy(out_THD).double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("page", [1, 5, 16, 24, 32, 41])
@pytest.mark.parametrize("window", [None, 13])
def test_the_places_of_cached_keys_change_no_bit(page: int, window: int | None) -> None:
    """41 cached positions on pages in another order, side by side or not, beside a pass over all rows without a cache."""
    rows, cached = 48, 41
    (q, k, v), memory = _rows(rows), _lines(rows)
    whole, expected = PackedPlan.of(causal([[0] * rows]), None, 2, {"hybrid": window}), np.empty_like(q)
    attend(0, 1, whole, 0, q, k, v, k[:0], v[:0], memory, expected)
    pages = np.random.default_rng(page).permutation(-(-cached // page) + 3)
    place_L = pages[np.arange(cached) // page] * page + np.arange(cached) % page
    pools = [np.full((len(pages) * page, *x.shape[1:]), np.nan, np.float32) for x in (k, v)]
    for pool, x in zip(pools, (k, v), strict=True):
        pool[place_L] = x[:cached]
    plan, out_THD = whole._replace(
        range_W4T=whole.range_W4T[..., cached:].copy(), first_S1=np.array([0, rows - cached]), mask_S=np.array([rows - cached]),
        start_S=np.array([cached]), place_SL=place_L[None],
    ), np.empty_like(q[cached:])  # fmt: skip
    attend(0, 1, plan, 0, *(x[cached:].copy() for x in (q, k, v)), *pools, memory, out_THD)
    assert np.array_equal(out_THD, expected[cached:])


def _lines(keys: int) -> Lines:
    sizes = HEADS // KV_HEADS, KV_HEADS, SIZE, width_of(keys)
    return lines_of(Lines.of(1, *sizes, lambda _, *shape: np.zeros(shape, np.float32)), 0)


def _rows(count: int) -> list[np.ndarray]:
    """q_THD, k_TGD, v_TGD."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(48, heads, SIZE, generator=draw)[:count].numpy() for heads in (HEADS, KV_HEADS, KV_HEADS)]
