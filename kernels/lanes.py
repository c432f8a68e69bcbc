"""Registers of float32 on a CPU, for functions that numba compiles: how many numbers one holds, copies of lines, and the
transposition of a matrix. They move numbers and compute nothing.

numba vectorises a loop only if it is long: a loop over the features of a head takes several times as long as these.

Legend: R rows, C columns, both of float32; n = `LANES`.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils, codegen, config
from numba.extending import intrinsic

from .compiled import compiled

_LONG, _INT, _VECTOR = ir.IntType(64), ir.IntType(32), ir.VectorType


def has(feature: str) -> bool:
    """Whether numba compiles for a processor with this x86 feature (`NUMBA_CPU_FEATURES`, or this machine's own)."""
    features = codegen.get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
    return f"+{feature}" in features.split(",")


LANES = 16 if has("avx512f") else 8
"""Floats in a register."""


def _pointer(builder: ir.IRBuilder, array: Any, index: Any) -> Any:
    return builder.bitcast(builder.gep(array.data, [index]), _VECTOR(ir.FloatType(), LANES).as_pointer())


@intrinsic
def copy_line(typing_context, source, at, target, to, count):
    """Copies `count` numbers from the flat place `at` of one contiguous array to the flat place `to` of another."""

    def generate(context, builder, signature, arguments):
        source, target = (context.make_array(signature.args[i])(context, builder, arguments[i]) for i in (0, 2))
        _, at, _, to, count = arguments
        registers = builder.udiv(count, _LONG(LANES))
        with cgutils.for_range(builder, registers) as loop:
            done = builder.mul(loop.index, _LONG(LANES))
            numbers = builder.load(_pointer(builder, source, builder.add(at, done)), align=4)
            builder.store(numbers, _pointer(builder, target, builder.add(to, done)), align=4)
        with cgutils.for_range_slice(builder, builder.mul(registers, _LONG(LANES)), count, _LONG(1)) as (i, _):
            number = builder.load(builder.gep(source.data, [builder.add(at, i)]))
            builder.store(number, builder.gep(target.data, [builder.add(to, i)]))
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp, types.intp), generate


@intrinsic
def _turn_square(typing_context, source_RC, r, c, target_CR, to):
    """Rows r.. and columns c.., n each, to rows c.. and columns to.. of the target."""

    def generate(context, builder, signature, arguments):
        source, target = (context.make_array(signature.args[i])(context, builder, arguments[i]) for i in (0, 3))
        _, r, c, _, to = arguments
        widths = [cgutils.unpack_tuple(builder, array.shape)[1] for array in (source, target)]

        def place(array: Any, width: Any, row: Any, column: Any, line: int) -> Any:
            return _pointer(builder, array, builder.add(builder.mul(builder.add(row, _LONG(line)), width), column))

        lines = [builder.load(place(source, widths[0], r, c, i), align=4) for i in range(LANES)]
        half = LANES // 2
        halves = [
            ir.Constant(_VECTOR(_INT, LANES), [number for i in range(half) for number in (first + i, first + i + LANES)])
            for first in (0, half)
        ]
        # After log2(n) rounds of putting line i and line i + n / 2 together, number by number, the square is transposed.
        for _ in range(LANES.bit_length() - 1):
            lines = [builder.shuffle_vector(lines[i], lines[i + half], part) for i in range(half) for part in halves]
        for i, line in enumerate(lines):
            builder.store(line, place(target, widths[1], c, to, i), align=4)
        return context.get_dummy_value()

    return types.void(source_RC, types.intp, types.intp, target_CR, types.intp), generate


@compiled()
def turn(source_RC, first, rows, target_CR, to):
    """Transposes the `rows` rows from `first` on, a multiple of n, into the columns from `to` on."""
    columns = source_RC.shape[1]
    whole = columns // LANES * LANES
    for c in range(0, whole, LANES):
        for r in range(0, rows, LANES):
            _turn_square(source_RC, first + r, c, target_CR, to + r)
    for c in range(whole, columns):
        for r in range(rows):
            target_CR[c, to + r] = source_RC[first + r, c]
