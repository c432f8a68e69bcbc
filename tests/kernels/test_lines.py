"""Functions of a line: elementwise ones beside NumPy's, and the one order in which each sum is taken, on every processor."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba")

from blockroll.kernels import lines
from blockroll.kernels.attention.numba import weigh
from blockroll.kernels.compiled import compiled, exponential
from blockroll.kernels.registers import FUSED

COUNTS = [0, 1, 7, 8, 15, 16, 24, 31, 64, 72, 101, 192, 203]
_F = np.float32


@compiled()
def sums(x, at, count):
    return lines.total(x, at, count), lines.squares(x, at, count)


@compiled()
def elementwise(x, at, divisor, wide, quotient, to, count):
    lines.widen_line(x, at, wide, to, count)
    lines.divide_line(x, at, divisor, quotient, to, count)


@compiled()
def apart(x, at, out, to, pieces, count, distance):
    lines.copy_apart(x, at, out, to, pieces, count, distance)


@compiled()
def weights_of(score, at, rows, width, ranges, weight, to):
    weigh(score, at, rows, width, ranges[0], ranges[1], ranges[2], ranges[3], weight, to)


def _in_order(x: np.ndarray, squared: bool) -> np.float32:
    """The sum as `registers.summed` defines it."""
    total, done = _F(0), 0
    for registers, lanes in (4, 16), (1, 8), (1, 1):
        step = registers * lanes
        until = len(x) // step * step
        if done < until:
            sums = np.zeros(step, _F)
            sums[0] = total
            for i in range(done, until, step):
                term = x[i : i + step]
                if squared and FUSED:  # exact in float64 but for the sum, which differs from one rounding in one case of 2**29
                    sums = (term.astype(np.float64) ** 2 + sums).astype(_F)
                else:
                    sums = sums + (term * term if squared else term)
            if registers == 4:
                first, second, third, fourth = sums.reshape(4, 16)
                sums = (first + second) + (third + fourth)
            while len(sums) > 1:
                sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
            total, done = sums[0], until
    return total


@pytest.mark.parametrize("count", COUNTS)
def test_sums_have_one_order(count: int) -> None:
    x = np.random.default_rng(count).normal(size=count + 10).astype(_F)
    x[:3], x[3 + count :] = np.nan, np.nan
    expected = _in_order(x[3 : 3 + count], False), _in_order(x[3 : 3 + count], True)
    assert sums(x, 3, count) == expected
    np.testing.assert_allclose(expected[1], (x[3 : 3 + count].astype(np.float64) ** 2).sum(), rtol=1e-5)


@pytest.mark.parametrize("count", COUNTS)
def test_lines_are_widened_and_divided(count: int) -> None:
    x = np.random.default_rng(count).normal(size=count + 10).astype(_F)
    wide, quotient = np.full(count + 20, np.nan), np.full(count + 20, np.nan, _F)
    elementwise(x, 5, _F(3), wide, quotient, 9, count)
    for out, expected in (wide, x[5 : 5 + count]), (quotient, x[5 : 5 + count] / _F(3)):
        assert np.array_equal(out[9 : 9 + count], expected)
        assert np.isnan(out[:9]).all() and np.isnan(out[9 + count :]).all()


@pytest.mark.parametrize("pieces", [0, 1, 3])
@pytest.mark.parametrize("count", COUNTS[:9])
def test_pieces_are_copied_apart(pieces: int, count: int) -> None:
    x, out = np.arange(5 + pieces * count, dtype=_F), np.full((pieces + 1, count + 7), np.nan, _F)
    apart(x, 5, out, 3, pieces, count, out.shape[1])
    expected = np.full_like(out, np.nan)
    expected[:pieces, 3 : 3 + count] = x[5:].reshape(pieces, count)
    assert np.array_equal(out, expected, equal_nan=True)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("ranges", [(0, 1, 0, 0), (0, 32, 0, 0), (13, 14, 0, 0), (3, 29, 0, 0), (2, 17, 20, 31), (0, 0, 5, 9)])
def test_weights_of_the_keys_that_a_row_sees(rows: int, kind: type, ranges: tuple[int, int, int, int]) -> None:
    """exp(score - largest) with the bits of `exponential`, 0 elsewhere, whatever the scores there are; nothing beside them."""
    width, at, to = 32, 7, 5
    begin, end, begin_block, end_block = ranges
    seen = np.zeros(width, bool)
    seen[begin:end] = seen[begin_block:end_block] = True
    score, weight = np.full(rows * width + 20, np.nan, kind), np.full(rows * width + 20, -1, _F)
    score_RL, weight_RL = (x[first : first + rows * width].reshape(rows, width) for x, first in ((score, at), (weight, to)))
    score_RL[:, seen] = np.random.default_rng(0).normal(scale=30, size=(rows, seen.sum()))
    score_RL[:, ~seen] = np.resize([np.nan, np.inf, 1e30, -np.inf], (~seen).sum())
    weights_of(score, at, rows, width, np.array(ranges), weight, to)
    own = np.ascontiguousarray(score_RL[:, seen])
    expected = (own - own.max(1, keepdims=True).astype(_F)).astype(_F)
    expected = np.array([[exponential(number) for number in line] for line in expected])
    assert np.array_equal(weight_RL[:, seen], expected) and (expected.max(1) > 0.999).all()
    assert (weight_RL[:, ~seen] == 0).all()
    assert (weight[:to] == -1).all() and (weight[to + rows * width :] == -1).all()
