"""The edge of a support among the numbers of a row, by bisection over their bits: functions that the edge kernel calls.

They read the numbers gathered in `near`, or (`far`) the whole row `own`. A compiler for AMD refuses a choice of two pointers of
which one is into more than 2 GiB, so both are loaded under masks. Their loops call no other functions: the interpreter takes a
millisecond for a call.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def key_of(x):
    """Integers in the order of the numbers."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def weigh_above(near, own, far, count, edge, high, top, temperature, SCALE: tl.constexpr, TILE: tl.constexpr):
    """Weight and number of the numbers below `high` that are above `edge`, and how many equal it."""
    mass_I, count_I = tl.full((TILE,), 0, tl.int64), tl.full((TILE,), 0, tl.int32)
    equal_I = count_I
    for start in range(0, count, TILE):
        inside = start + tl.arange(0, TILE) < count
        x = tl.div_rn(tl.load(own + start + tl.arange(0, TILE), inside & far, float("-inf")), temperature)
        x = tl.maximum(x, tl.load(near + start + tl.arange(0, TILE), inside & (far == 0), float("-inf")))
        there = (x > edge) & (x < high)
        mass_I += tl.where(there, (tl.exp(x - top) * SCALE).to(tl.int64), 0)
        count_I += there.to(tl.int32)
        equal_I += ((x == edge) & inside).to(tl.int32)
    return tl.sum(mass_I, 0), tl.sum(count_I, 0), tl.sum(equal_I, 0)


@triton.jit
def smallest(
    near, own, far, count, low, high, above, least, top, temperature,
    MASS: tl.constexpr, SCALE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The smallest number t for which the weight (or how many there are) of numbers above t is below `least`. `above`: of those
    that are not below `high`."""
    under, over = key_of(low), key_of(tl.minimum(high, top))
    while under < over:
        middle = (under >> 1) + (over >> 1) + (under & over & 1)
        edge = (middle ^ ((middle >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        sum_I = tl.full((TILE,), 0, tl.int64 if MASS else tl.int32)
        for start in range(0, count, TILE):
            inside = start + tl.arange(0, TILE) < count
            x = tl.div_rn(tl.load(own + start + tl.arange(0, TILE), inside & far, float("-inf")), temperature)
            x = tl.maximum(x, tl.load(near + start + tl.arange(0, TILE), inside & (far == 0), float("-inf")))
            there = (x > edge) & (x < high)
            sum_I += tl.where(there, (tl.exp(x - top) * SCALE).to(tl.int64), 0) if MASS else there.to(tl.int32)
        holds = above + tl.sum(sum_I, 0) < least
        under, over = tl.where(holds, under, middle + 1), tl.where(holds, middle, over)
    return (over ^ ((over >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
