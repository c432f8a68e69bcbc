"""What CCA does with a head between its convolutions and the attention, compiled by numba: means, norm, temperature and RoPE.

Invariants: as of `registers`. Formulas: `reference`.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from ..lines import PLACE, SINGLE
from ..registers import Numbers, along, one, squares_of, written


@intrinsic
def turn_head(typing_context, x, at, bias, at_bias, mean, at_mean, temperature, least, cos, at_cos, sin, at_sin, half, out, to,
              size):  # fmt: skip
    """The query or key of a row and head.

        y = x + bias + mean;  z = y * (temperature / max(|y|, least));  out = z * cos + swapped(z) * sin

    The rotation is of the first 2 * half numbers, and swaps the two halves of them. The sine has the sign of what it is
    multiplied by."""

    def write_head(builder, x, bias, mean, temperature, least, cos, sin, half, out, size):
        def load(line: Any, i: Any, lanes: int) -> Numbers:
            return Numbers.load(builder, line, i, lanes)

        along(builder, size, lambda i, lanes: (load(x, i, lanes) + load(bias, i, lanes) + load(mean, i, lanes)).store(out, i))
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

    kinds = x, PLACE, bias, PLACE, mean, PLACE, SINGLE, SINGLE, cos, PLACE, sin, PLACE, PLACE, out, PLACE, PLACE
    return written(types.void(*kinds), write_head)
