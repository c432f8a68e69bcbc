"""Lines of the router and of the experts on a CPU, compiled by numba: the router's state and norm, gelu, silu.

Invariants and the word line: as of `lines`. Products are rounded before they are added.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from ..lines import PLACE, SINGLE
from ..registers import Numbers, along, one, squares_of, written


@intrinsic
def normed_state(typing_context, state, at, bias, at_bias, below, at_below, scale, at_scale, taken, floor, out, to, count):
    """state = state + bias + below * scale, in place, the last summand for the first `taken` numbers alone, and out = state /
    sqrt(sum state^2 + floor)."""

    def write_state(builder, state, bias, below, scale, taken, floor, out, count):
        def load(line: Any, i: Any, lanes: int) -> Numbers:
            return Numbers.load(builder, line, i, lanes)

        along(builder, count, lambda i, lanes: (load(state, i, lanes) + load(bias, i, lanes)).store(state, i))
        along(
            builder, taken,
            lambda i, lanes: (load(state, i, lanes) + load(below, i, lanes) * load(scale, i, lanes)).store(state, i),
        )  # fmt: skip
        length = (one(builder, squares_of(builder, state, count)) + one(builder, floor)).root()
        factor = Numbers.all(builder, 1.0, 1) / length
        along(builder, count, lambda i, lanes: (load(state, i, lanes) * factor.everywhere(lanes)).store(out, i))

    kinds = state, PLACE, bias, PLACE, below, PLACE, scale, PLACE, PLACE, SINGLE, out, PLACE, PLACE
    return written(types.void(*kinds), write_state)


@intrinsic
def gelu_line(typing_context, x, at, bias, at_bias, out, to, count):
    """y Phi(y) of y = x + bias; erf by Abramowitz and Stegun 7.1.26, within 1.5e-7."""

    def write_gelu(builder, x, bias, out, count):
        def gelu(i: Any, lanes: int) -> None:
            y = Numbers.load(builder, x, i, lanes) + Numbers.load(builder, bias, i, lanes)
            t = Numbers.all(builder, 1.0, lanes) / (y.size() * 0.70710678 * 0.3275911 + 1.0)
            p = t * 1.061405429 + -1.453152027
            for coefficient in (1.421413741, -0.284496736, 0.254829592):
                p = p * t + coefficient
            tail = p * t * 0.5 * (-y * y * 0.5).exponential()  # Phi(-|y|)
            negative = Numbers.all(builder, 0.0, lanes) > y
            (y * tail.where(negative, Numbers.all(builder, 1.0, lanes) - tail)).store(out, i)

        along(builder, count, gelu)

    return written(types.void(x, PLACE, bias, PLACE, out, PLACE, PLACE), write_gelu)


@intrinsic
def silu_line(typing_context, gate, at, up, at_up, out, to, count):
    """gate / (1 + exp(-gate)) * up."""

    def write_silu(builder, gate, up, out, count):
        def silu(i: Any, lanes: int) -> None:
            x, most = Numbers.load(builder, gate, i, lanes), Numbers.all(builder, 87.0, lanes)
            exponent = most.where(-x > most, -x)
            (x / (exponent.exponential() + 1.0) * Numbers.load(builder, up, i, lanes)).store(out, i)

        along(builder, count, silu)

    return written(types.void(gate, PLACE, up, PLACE, out, PLACE, PLACE), write_silu)
