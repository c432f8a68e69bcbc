"""Functions of a line of numbers, for functions that numba compiles: numba vectorises a loop only if it is long.

A line is `count` numbers of a contiguous float32 array from its flat place `at` on; results go to the flat place `to` of another.

Invariants: as of `registers`. `copy_line` is in `lanes`.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .registers import Numbers, along, one, squares_of, summed, written

PLACE, SINGLE = types.intp, types.float32


@intrinsic
def total(typing_context, x, at, count):
    """Sum of a line."""

    def write_total(builder: ir.IRBuilder, x: Any, count: Any) -> Any:
        return summed(builder, count, lambda i, sums: sums + Numbers.load(builder, x, i, sums.lanes))

    return written(SINGLE(x, PLACE, PLACE), write_total)


@intrinsic
def squares(typing_context, x, at, count):
    """Sum of the squares of a line."""
    return written(SINGLE(x, PLACE, PLACE), squares_of)


@intrinsic
def widen_line(typing_context, x, at, out, to, count):
    """A copy of a line in a float64 array."""

    def write_wide(builder: ir.IRBuilder, x: Any, out: Any, count: Any) -> None:
        along(builder, count, lambda i, lanes: Numbers.load(builder, x, i, lanes).to(ir.DoubleType()).store(out, i))

    return written(types.void(x, PLACE, out, PLACE, PLACE), write_wide)


@intrinsic
def divide_line(typing_context, x, at, divisor, out, to, count):
    """x / divisor."""

    def write_quotients(builder: ir.IRBuilder, x: Any, divisor: Any, out: Any, count: Any) -> None:
        by = one(builder, divisor)
        along(builder, count, lambda i, lanes: (Numbers.load(builder, x, i, lanes) / by.everywhere(lanes)).store(out, i))

    return written(types.void(x, PLACE, SINGLE, out, PLACE, PLACE), write_quotients)


@intrinsic
def copy_apart(typing_context, x, at, out, to, pieces, count, apart):
    """Copies a line of `pieces` times `count` numbers to the flat places to, to + apart, ..., a piece each."""

    def write_copies(builder: ir.IRBuilder, x: Any, out: Any, pieces: Any, count: Any, apart: Any) -> None:
        with cgutils.for_range(builder, pieces) as loop:
            source, target = (builder.gep(line, [builder.mul(loop.index, by)]) for line, by in ((x, count), (out, apart)))
            along(builder, count, lambda i, lanes: Numbers.load(builder, source, i, lanes).store(target, i))

    return written(types.void(x, PLACE, out, *[PLACE] * 4), write_copies)
