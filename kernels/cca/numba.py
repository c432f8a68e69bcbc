"""What CCA does with a head between its convolutions and the attention, compiled by numba: means, norm, temperature and RoPE.

Invariants: as of `registers`. Formulas: `reference`.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..lines import PLACE, SINGLE
from ..registers import LONG, Numbers, along, one, squares_of, written


@intrinsic
def turn_head(typing_context, x, at, bias, at_bias, own, at_own, others, at_others, count, share, temperature, least, cos, at_cos,
              sin, at_sin, half, out, to, size):  # fmt: skip
    """The query or key of a row and head.

        y = x + bias + own / 2 + sum others * share;  z = y * (temperature / max(|y|, least));  out = z * cos + swapped(z) * sin

    `own` is the head before the convolutions; `others` are `count` heads side by side, a query's key or a key's queries, and
    `share` is 1 / (2 * count). The rotation is of the first 2 * half numbers, and swaps the two halves of them. The sine has the
    sign of what it is multiplied by."""

    def write_head(builder, x, bias, own, others, count, share, temperature, least, cos, sin, half, out, size):
        def load(line: Any, i: Any, lanes: int) -> Numbers:
            return Numbers.load(builder, line, i, lanes)

        def add(i: Any, lanes: int) -> None:
            first = load(others, i, lanes)
            total = cgutils.alloca_once_value(builder, first.value)
            builder.store(first.value, total)
            with cgutils.for_range_slice(builder, LONG(1), count, LONG(1)) as (head, _):
                other = load(others, builder.add(builder.mul(head, size), i), lanes)
                builder.store((Numbers(builder, builder.load(total)) + other).value, total)
            halves = load(own, i, lanes) * 0.5
            mean = Numbers(builder, builder.load(total)).times_plus(one(builder, share).everywhere(lanes), halves)
            (load(x, i, lanes) + load(bias, i, lanes) + mean).store(out, i)

        along(builder, size, add)
        length = one(builder, squares_of(builder, out, size)).root()
        factor = one(builder, temperature) / length.or_above(one(builder, least))

        def rotate(i: Any, lanes: int) -> None:
            places = i, builder.add(half, i)
            left, right = (load(out, place, lanes) * factor.everywhere(lanes) for place in places)
            for own, place, other in ((left, places[0], right), (right, places[1], left)):
                (own * load(cos, place, lanes) + other * load(sin, place, lanes)).store(out, place)

        def scale(i: Any, lanes: int) -> None:
            place = builder.add(turned, i)
            (load(out, place, lanes) * factor.everywhere(lanes)).store(out, place)

        turned = builder.add(half, half)
        along(builder, half, rotate)
        along(builder, builder.sub(size, turned), scale)

    lines = x, PLACE, bias, PLACE, own, PLACE, others, PLACE, PLACE, SINGLE, SINGLE, SINGLE, cos, PLACE, sin, PLACE, PLACE
    return written(types.void(*lines, out, PLACE, PLACE), write_head)
