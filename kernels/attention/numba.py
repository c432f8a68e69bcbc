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
from ..registers import LONG, Numbers, along, places, spread


def _arrays(context: Any, builder: Any, signature: Any, arguments: Any, *which: int) -> list[Any]:
    return [context.make_array(signature.args[i])(context, builder, arguments[i]) for i in which]


@intrinsic
def weigh(typing_context, score, at, width, begin, end, begin_block, end_block, weight, to):
    """weight_i = exp(score_i - top) for begin <= i < end and begin_block <= i < end_block, of which top is the largest, rounded
    to float32; 0 for all other i < width, a multiple of n. Scores, float32 or float64, lie from the flat place `at` of a
    contiguous array on, weights from `to` on; both may be the same memory. The difference is taken in the type of the scores."""

    def generate(context, builder, signature, arguments):
        score, weight = _arrays(context, builder, signature, arguments, 0, 7)
        _, at, width, begin, end, begin_block, end_block, _, to = arguments
        number, single = score.data.type.pointee, ir.FloatType()
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
            scores = Numbers.load(builder, score, builder.add(at, i)).where(seen(i), -np.inf)
            builder.store(scores.or_above(Numbers(builder, builder.load(top))).value, top)
        largest = Numbers(builder, builder.load(top)).folded(Numbers.or_above).to(single).to(number).everywhere(LANES)
        with cgutils.for_range_slice(builder, LONG(0), width, LONG(LANES)) as (i, _):
            scores = Numbers.load(builder, score, builder.add(at, i))
            (scores - largest).to(single).exponential().where(seen(i), 0.0).store(weight, builder.add(to, i))
        return context.get_dummy_value()

    place = types.intp
    return types.void(score, place, place, place, place, place, place, weight, place), generate


@intrinsic
def widen_line(typing_context, source, at, target, to, count):
    """Copies `count` float32 numbers from the flat place `at` of a contiguous array to `to` of a float64 one."""

    def generate(context, builder, signature, arguments):
        source, target = _arrays(context, builder, signature, arguments, 0, 2)
        _, at, _, to, count = arguments

        def body(i: Any, lanes: int) -> None:
            Numbers.load(builder, source, builder.add(at, i), lanes).to(ir.DoubleType()).store(target, builder.add(to, i))

        along(builder, count, body)
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp, types.intp), generate


@intrinsic
def divide_line(typing_context, source, at, divisor, target, to, count):
    """Writes the quotients of `count` float32 numbers from the flat place `at` of a contiguous array to `to` of another."""

    def generate(context, builder, signature, arguments):
        source, target = _arrays(context, builder, signature, arguments, 0, 3)
        _, at, divisor, _, to, count = arguments
        one = Numbers(builder, builder.insert_element(Numbers.all(builder, 0.0, 1).value, divisor, ir.IntType(32)(0)))

        def body(i: Any, lanes: int) -> None:
            quotients = Numbers.load(builder, source, builder.add(at, i), lanes) / one.everywhere(lanes)
            quotients.store(target, builder.add(to, i))

        along(builder, count, body)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.float32, target, types.intp, types.intp), generate
