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
def weigh(typing_context, score, at, width, begin, end, begin_block, end_block, weight, to):
    """weight_i = exp(score_i - top) for begin <= i < end and begin_block <= i < end_block, of which top is the largest, rounded
    to float32; 0 for all other i < width, a multiple of n. Scores, float32 or float64, lie from the flat place `at` of a
    contiguous array on, weights from `to` on; both may be the same memory. The difference is taken in the type of the scores."""

    def write_weights(builder, score, width, begin, end, begin_block, end_block, weight):
        number, single = score.type.pointee, ir.FloatType()
        ranges = [
            (spread(builder, first), spread(builder, builder.sub(last, first)))
            for first, last in ((begin, end), (begin_block, end_block))
        ]

        def seen(i: Any) -> Any:
            index = places(builder, i)
            return builder.or_(*(builder.icmp_unsigned("<", builder.sub(index, first), count) for first, count in ranges))

        top = cgutils.alloca_once_value(builder, Numbers.all(builder, -np.inf, of=number).value)
        builder.store(Numbers.all(builder, -np.inf, of=number).value, top)
        with cgutils.for_range_slice(builder, LONG(0), width, LONG(LANES)) as (i, _):
            scores = Numbers.load(builder, score, i).where(seen(i), -np.inf)
            builder.store(scores.or_above(Numbers(builder, builder.load(top))).value, top)
        largest = Numbers(builder, builder.load(top)).folded(Numbers.or_above).to(single).to(number).everywhere(LANES)
        with cgutils.for_range_slice(builder, LONG(0), width, LONG(LANES)) as (i, _):
            scores = Numbers.load(builder, score, i)
            (scores - largest).to(single).exponential().where(seen(i), 0.0).store(weight, i)

    return written(types.void(score, PLACE, PLACE, PLACE, PLACE, PLACE, PLACE, weight, PLACE), write_weights)
