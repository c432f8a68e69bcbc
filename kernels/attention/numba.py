"""The softmax between the two products of an attention on a CPU, one row at a time, in registers.

Invariants: as of `registers`.

Legend: L keys, n = `LANES`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..lanes import LANES
from ..lines import PLACE
from ..registers import LONG, Numbers, places, spread, written


@intrinsic
def weigh(typing_context, score, at, rows, width, begin, end, begin_block, end_block, weight, to):
    """weight_i = exp(score_i - top) for begin <= i < end and begin_block <= i < end_block, of which top is the largest, rounded
    to float32; 0 for all other i < width, a multiple of n. So for some rows that see the same keys. Scores, float32 or float64,
    lie from the flat place `at` of a contiguous array on, row by row, weights from `to` on; both may be the same memory. The
    difference is taken in the type of the scores."""

    def write_weights(builder, score, rows, width, begin, end, begin_block, end_block, weight):
        number, single = score.type.pointee, ir.FloatType()
        lowest = Numbers.all(builder, -np.inf, of=number)
        ranges = [
            (spread(builder, first), spread(builder, builder.sub(last, first)))
            for first, last in ((begin, end), (begin_block, end_block))
        ]

        def seen(i: Any) -> Any:
            index = places(builder, i)
            return builder.or_(*(builder.icmp_unsigned("<", builder.sub(index, first), count) for first, count in ranges))

        def weigh_rows(first: Any, count: int) -> None:
            begins = [builder.mul(builder.add(first, LONG(r)), width) for r in range(count)]
            tops = [cgutils.alloca_once_value(builder, lowest.value) for _ in begins]
            for top in tops:
                builder.store(lowest.value, top)
            with cgutils.for_range_slice(builder, LONG(0), width, LONG(LANES)) as (i, _):
                seen_n = seen(i)
                for begin_row, top in zip(begins, tops, strict=True):
                    scores = Numbers.load(builder, score, builder.add(begin_row, i)).where(seen_n, -np.inf)
                    builder.store(scores.or_above(Numbers(builder, builder.load(top))).value, top)
            largest = [
                Numbers(builder, builder.load(top)).folded(Numbers.or_above).to(single).to(number).everywhere(LANES)
                for top in tops
            ]  # fmt: skip
            with cgutils.for_range_slice(builder, LONG(0), width, LONG(LANES)) as (i, _):
                seen_n = seen(i)
                for begin_row, top in zip(begins, largest, strict=True):
                    scores = Numbers.load(builder, score, builder.add(begin_row, i))
                    (scores - top).to(single).exponential().where(seen_n, 0.0).store(weight, builder.add(begin_row, i))

        pairs = builder.mul(builder.udiv(rows, LONG(2)), LONG(2))
        with cgutils.for_range_slice(builder, LONG(0), pairs, LONG(2)) as (r, _):
            weigh_rows(r, 2)
        with builder.if_then(builder.icmp_signed("<", pairs, rows)):
            weigh_rows(pairs, 1)

    return written(types.void(score, *[PLACE] * 7, weight, PLACE), write_weights)
