"""Copies and transpositions by registers move every number to its place, and no other."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba")

from blockroll.kernels import lanes
from blockroll.kernels.compiled import compiled


@compiled()
def copied(source, at, target, to, count):
    lanes.copy_line(source, at, target, to, count)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 16, 31, 32, 53])
def test_a_line_is_copied(count: int) -> None:
    source, target = np.arange(3 * 5 * 7, dtype=np.float32).reshape(3, 5, 7), np.full((9, 11), -1, np.float32)
    copied(source, 13, target, 22, count)
    expected = np.full(99, -1, np.float32)
    expected[22 : 22 + count] = np.arange(13, 13 + count)
    assert np.array_equal(target.ravel(), expected)


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("columns", [1, 8, 16, 24, 32, 37])
@pytest.mark.parametrize("first, to", [(0, 0), (2, 0), (1, 5)])
def test_rows_are_turned(rows: int, columns: int, first: int, to: int) -> None:
    count = rows * lanes.LANES
    source = np.arange((count + 4) * columns, dtype=np.float32).reshape(-1, columns)
    target = np.full((columns, count + 8), -1, np.float32)
    lanes.turn(source, first, count, target, to)
    assert np.array_equal(target[:, to : to + count], source[first : first + count].T)
    assert (np.delete(target, np.s_[to : to + count], axis=1) == -1).all()
