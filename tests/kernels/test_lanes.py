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
def test_rows_are_turned(rows: int, columns: int) -> None:
    count = rows * lanes.LANES
    source = np.arange((count + 2) * columns, dtype=np.float32).reshape(-1, columns)
    target = np.full((columns, count + 3), -1, np.float32)
    lanes.turn(source, count, target)
    assert np.array_equal(target[:, :count], source[:count].T)
    assert (target[:, count:] == -1).all()
