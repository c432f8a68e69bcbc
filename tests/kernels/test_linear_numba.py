"""The product in one order of summation (numba): equal to float64's, and a row's bits depend on nothing but the row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from blockroll.kernels.linear import numba as linear

SIZES = [(1, 1), (7, 5), (33, 70), (40, 32), (128, 448), (200, 274)]


def operands(rows: int, d: int, f: int) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
    """x_TD, w_DF and an output that holds NaN."""
    draw = torch.Generator().manual_seed(d)
    x, weight = torch.randn(rows, d, generator=draw).numpy(), torch.randn(d, f, generator=draw)
    return x, weight, np.full((rows, f), np.nan, np.float32)


@pytest.mark.parametrize("d, f", SIZES)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 9, 45])
def test_equals_float64(rows: int, d: int, f: int) -> None:
    x, weight, out = operands(rows, d, f)
    linear.product(x, linear.pack(weight), out)
    np.testing.assert_allclose(out, x.astype(np.float64) @ weight.double().numpy(), atol=2e-6 * d, rtol=0)


@pytest.mark.parametrize("d, f", SIZES)
def test_a_row_depends_on_neither_its_number_nor_its_place(d: int, f: int) -> None:
    x, weight, together = operands(45, d, f)
    panels = linear.pack(weight)
    linear.product(x, panels, together)
    for count in range(1, 2 * linear.ROWS + 2):
        for first in (0, 1, 45 - count):
            some = np.full((count, f), np.nan, np.float32)
            linear.product(x[first : first + count].copy(), panels, some)
            assert np.array_equal(some, together[first : first + count])


def test_sums_are_one_chain_in_order() -> None:
    """Each output is the chain of the formula, for every number of columns: fused where the processor fuses."""
    x, weight, out = operands(3, 50, 37)
    linear.product(x, linear.pack(weight), out)
    expected = np.zeros((3, 37), np.float32)
    for d in range(50):
        if linear.FUSED:  # exact in float64 but for the sum, which differs from one rounding in one case of 2**29
            expected = (x[:, d, None].astype(np.float64) * weight[d].numpy() + expected).astype(np.float32)
        else:
            expected = x[:, d, None] * weight[d].numpy() + expected
    assert np.array_equal(out, expected)


def test_only_the_rows_asked_for_are_written() -> None:
    x, weight, out = operands(20, 12, 40)
    linear.product_of(x, 3, 14, linear.pack(weight), out)
    assert np.isnan(out[:3]).all() and np.isnan(out[14:]).all() and np.isfinite(out[3:14]).all()


@pytest.mark.parametrize("rows, depth, first, begin", [(0, 12, 0, 0), (1, 12, 0, 32), (11, 7, 5, 64), (20, 9, 3, 32)])
@pytest.mark.parametrize("features, kind", [(64, np.float32), (48, np.float64), (16, np.float64)])
def test_a_part_of_a_weight_that_is_not_in_panels(rows, depth, first, begin, features, kind) -> None:
    x, weight, out = operands(20, 12, 128)
    out = out[:, :features].copy()
    part = weight[first : first + depth, begin : begin + features].clone()
    weight[:] = torch.nan
    weight[first : first + depth, begin : begin + features] = part
    linear.product_with_rows(x, rows, depth, weight.numpy(), first, begin, features, out)
    np.testing.assert_allclose(out[:rows], x[:rows, :depth] @ part.numpy(), atol=1e-5)
    assert np.isnan(out[rows:]).all()
    wide = np.full(out.shape, np.nan)
    linear.wide_product_with_rows(x.astype(kind), rows, depth, weight.numpy(), first, begin, features, wide)
    chain = np.zeros((rows, features))
    for d in range(depth):  # the product of two float32 numbers is exact in float64
        chain += x[:rows, d, None].astype(np.float64) * part[d].double().numpy()
    assert np.array_equal(wide[:rows], chain) and np.isnan(wide[rows:]).all()


@pytest.mark.parametrize("d, f", SIZES)
def test_products_that_are_rounded_before_they_are_added(d: int, f: int) -> None:
    x, weight, out = operands(11, d, f)
    linear.plain_product_of(x, 1, 10, linear.pack(weight), out)
    chain = np.zeros((9, f), np.float32)
    for i in range(d):
        chain += x[1:10, i, None] * weight[i].numpy()
    assert np.array_equal(out[1:10], chain) and np.isnan(out[[0, 10]]).all()


def test_many_products_at_once() -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 5, 17, generator=draw), torch.randn(3, 17, 8, generator=draw)
    out = np.full((3, 5, 8), np.nan, np.float32)
    linear.products(x.numpy(), linear.pack(weight), out)
    np.testing.assert_allclose(out, torch.bmm(x, weight).numpy(), atol=1e-5)


def test_a_poisoned_row_stays_in_its_row() -> None:
    x, weight, out = operands(9, 12, 40)
    x[4] = np.nan
    linear.product(x, linear.pack(weight), out)
    assert np.isnan(out[4]).all() and np.isfinite(out[np.arange(9) != 4]).all()
