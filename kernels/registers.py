"""Arithmetic on registers of a CPU, for intrinsics of functions that numba compiles. numba vectorises a loop only if it is long,
and reads and writes a line once per loop.

Invariants:
- A number's result depends on that number alone, whatever lies beside it. Sums across a line have one order on all processors.
- Products and sums are fused where `times_plus` says so, and nowhere else.

Legend: n = `LANES`.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .lanes import LANES, has

LONG = ir.IntType(64)
_INT, _VECTOR = ir.IntType(32), ir.VectorType
FUSED = platform.machine() not in ("x86_64", "AMD64") or has("fma")
"""Whether the processor rounds a product and the sum that it goes into once, together."""


def _call(builder: ir.IRBuilder, name: str, *arguments: Any) -> Any:
    """LLVM's function of this name, of vectors of one type."""
    vector = arguments[0].type
    kind = ir.FunctionType(vector, [vector] * len(arguments))
    suffix = f"v{vector.count}{'f64' if vector.element == ir.DoubleType() else 'f32'}"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.{suffix}"), arguments)


class Numbers:
    """Some float numbers side by side, in the code that an intrinsic writes. The operators are those of IEEE 754, number by
    number; the other operand is `Numbers` of as many, or one number for all."""

    def __init__(self, builder: ir.IRBuilder, value: Any) -> None:
        self.builder, self.value = builder, value

    @property
    def lanes(self) -> int:
        """How many."""
        return self.value.type.count

    @classmethod
    def all(cls, builder: ir.IRBuilder, number: float, lanes: int = LANES, of: Any = None) -> Numbers:
        """`lanes` times one number."""
        return cls(builder, ir.Constant(_VECTOR(of or ir.FloatType(), lanes), [number] * lanes))

    @classmethod
    def load(cls, builder: ir.IRBuilder, line: Any, at: Any, lanes: int = LANES) -> Numbers:
        """From the place `at` of a line on."""
        return cls(builder, builder.load(_pointer(builder, line, at, lanes), align=1))

    def store(self, line: Any, at: Any) -> None:
        """From the place `at` of a line on."""
        self.builder.store(self.value, _pointer(self.builder, line, at, self.lanes), align=1)

    def _alike(self, other: Any) -> Any:
        kind = self.value.type
        return other.value if isinstance(other, Numbers) else ir.Constant(kind, [other] * kind.count)

    def __add__(self, other: Numbers | float) -> Numbers:
        return Numbers(self.builder, self.builder.fadd(self.value, self._alike(other)))

    def __sub__(self, other: Numbers | float) -> Numbers:
        return Numbers(self.builder, self.builder.fsub(self.value, self._alike(other)))

    def __mul__(self, other: Numbers | float) -> Numbers:
        return Numbers(self.builder, self.builder.fmul(self.value, self._alike(other)))

    def __truediv__(self, other: Numbers | float) -> Numbers:
        return Numbers(self.builder, self.builder.fdiv(self.value, self._alike(other)))

    def __neg__(self) -> Numbers:
        return Numbers(self.builder, self.builder.fneg(self.value))

    def __gt__(self, other: Numbers | float) -> Any:
        """A condition for `where`; false beside NaN."""
        return self.builder.fcmp_ordered(">", self.value, self._alike(other))

    def where(self, condition: Any, otherwise: Numbers | float) -> Numbers:
        """These numbers where the condition holds, the others elsewhere."""
        return Numbers(self.builder, self.builder.select(condition, self.value, self._alike(otherwise)))

    def or_above(self, other: Numbers | float) -> Numbers:
        """The larger one; the other where this one is NaN."""
        return self.where(self > other, other)

    def times_plus(self, factor: Numbers | float, summand: Numbers | float) -> Numbers:
        """self * factor + summand, rounded once where the processor can."""
        if not FUSED:
            return self * factor + summand
        return Numbers(self.builder, _call(self.builder, "fma", self.value, self._alike(factor), self._alike(summand)))

    def root(self) -> Numbers:
        return Numbers(self.builder, _call(self.builder, "sqrt", self.value))

    def size(self) -> Numbers:
        """|x|."""
        return Numbers(self.builder, _call(self.builder, "fabs", self.value))

    def floor(self) -> Numbers:
        return Numbers(self.builder, _call(self.builder, "floor", self.value))

    def to(self, number: Any) -> Numbers:
        """As numbers of another type, rounded."""
        builder, target = self.builder, _VECTOR(number, self.value.type.count)
        if target == self.value.type:
            return self
        return Numbers(builder, (builder.fpext if number == ir.DoubleType() else builder.fptrunc)(self.value, target))

    def everywhere(self, lanes: int) -> Numbers:
        """The first number, so many times."""
        first = ir.Constant(_VECTOR(_INT, lanes), [0] * lanes)
        return Numbers(self.builder, self.builder.shuffle_vector(self.value, self.value, first))

    def folded(self, together: Callable[[Numbers, Numbers], Numbers]) -> Numbers:
        """One number: the second half is put together with the first, until one is left."""
        numbers = self
        while (count := numbers.value.type.count) > 1:
            low, high = (
                Numbers(self.builder, self.builder.shuffle_vector(numbers.value, numbers.value, ir.Constant(
                    _VECTOR(_INT, count // 2), [*range(first, first + count // 2)])))
                for first in (0, count // 2)
            )  # fmt: skip
            numbers = together(low, high)
        return numbers

    def exponential(self) -> Numbers:
        """exp to two units in the last place, with the bits of `compiled.exponential`. Numbers below -87 count as -87."""
        builder, y = self.builder, self.or_above(-87.0)
        n = y.times_plus(1.44269504, 0.5).floor()
        r = n.times_plus(2.12194440e-4, n.times_plus(-0.693359375, y))
        p = r.times_plus(1.9875691500e-4, 1.3981999507e-3)
        for coefficient in (8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            p = p.times_plus(r, coefficient)
        p = (p * r).times_plus(r, r) + 1.0
        kind = _VECTOR(_INT, self.value.type.count)
        shift = builder.shl(builder.fptosi(n.value, kind), ir.Constant(kind, [23] * kind.count))
        return Numbers(builder, builder.bitcast(builder.add(builder.bitcast(p.value, kind), shift), self.value.type))


def _pointer(builder: ir.IRBuilder, line: Any, at: Any, lanes: int) -> Any:
    pointer = builder.gep(line, [at])
    return builder.bitcast(pointer, _VECTOR(pointer.type.pointee, lanes).as_pointer())


def one(builder: ir.IRBuilder, number: Any) -> Numbers:
    """A float32 as `Numbers`."""
    return Numbers(builder, builder.insert_element(Numbers.all(builder, 0.0, 1).value, number, _INT(0)))


def written(signature: Any, write: Callable[..., Any]) -> tuple[Any, Callable[..., Any]]:
    """What an intrinsic returns whose code write(builder, *arguments) writes. Each array is followed by a flat place in it, and
    `write` gets one pointer for both. The code is a function of its own: within its caller's, LLVM unrolls loops that end after
    one or two turns, and their many places do not fit into registers."""

    def generate(context, builder, signature, arguments):
        given = iter(zip(signature.args, arguments, strict=True))
        values = [
            builder.gep(context.make_array(kind)(context, builder, value).data, [next(given)[1]])
            if isinstance(kind, types.Array) else value
            for kind, value in given
        ]  # fmt: skip
        nothing = signature.return_type == types.void
        result = ir.VoidType() if nothing else context.get_value_type(signature.return_type)
        kind = ir.FunctionType(result, [value.type for value in values])
        name = f"{write.__module__}.{write.__qualname__}.{'.'.join(map(str, kind.args))}"
        function = builder.module.globals.get(name)
        if function is None:
            function = ir.Function(builder.module, kind, name)
            function.linkage = "internal"
            for attribute in ("noinline", "nounwind", "optsize"):
                function.attributes.add(attribute)
            inside = ir.IRBuilder(function.append_basic_block())
            returned = write(inside, *function.args)
            if nothing:
                inside.ret_void()
            else:
                inside.ret(returned)
        returned = builder.call(function, values)
        return context.get_dummy_value() if nothing else returned

    return signature, generate


def places(builder: ir.IRBuilder, first: Any) -> Any:
    """The int32 numbers first, first + 1, ... of a register."""
    kind = _VECTOR(_INT, LANES)
    return builder.add(spread(builder, first), ir.Constant(kind, [*range(LANES)]))


def spread(builder: ir.IRBuilder, number: Any) -> Any:
    """An int64 as an int32 in all places of a register."""
    kind = _VECTOR(_INT, LANES)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), builder.trunc(number, _INT), _INT(0))
    return builder.shuffle_vector(one, one, ir.Constant(kind, [0] * LANES))


def along(builder: ir.IRBuilder, count: Any, body: Callable[[Any, int], None]) -> None:
    """Writes body(place, lanes) for `count` places: registers first, then half ones, then the rest one by one."""
    done: Any = LONG(0)
    for lanes in dict.fromkeys((LANES, 8, 1)):
        until = builder.mul(builder.udiv(count, LONG(lanes)), LONG(lanes))
        with cgutils.for_range_slice(builder, done, until, LONG(lanes)) as (place, _):
            body(place, lanes)
        done = until


def summed(builder: ir.IRBuilder, count: Any, add: Callable[[Any, Numbers], Numbers]) -> Any:
    """The float32 sum over `count` places, where add(place, sums) adds the terms from a place on to as many sums. 64 sums side by
    side take in turn all terms but the last count % 64, and are folded; then 8 all terms but the last count % 8; then one."""
    sum_1 = cgutils.alloca_once_value(builder, Numbers.all(builder, 0.0, 1).value)
    builder.store(Numbers.all(builder, 0.0, 1).value, sum_1)
    done: Any = LONG(0)
    for registers, lanes in (4, 16), (1, 8), (1, 1):
        until = builder.mul(builder.udiv(count, LONG(registers * lanes)), LONG(registers * lanes))
        with builder.if_then(builder.icmp_signed("<", done, until)):
            nothing = Numbers.all(builder, 0.0, lanes)
            before = builder.extract_element(builder.load(sum_1), _INT(0))
            first = builder.insert_element(nothing.value, before, _INT(0))
            sums = [cgutils.alloca_once_value(builder, nothing.value) for _ in range(registers)]
            for each, value in zip(sums, [first] + [nothing.value] * (registers - 1), strict=True):
                builder.store(value, each)
            with cgutils.for_range_slice(builder, done, until, LONG(registers * lanes)) as (place, _):
                for number, each in enumerate(sums):
                    at = builder.add(place, LONG(number * lanes))
                    builder.store(add(at, Numbers(builder, builder.load(each))).value, each)
            parts = [Numbers(builder, builder.load(each)) for each in sums]
            while len(parts) > 1:
                parts = [low + high for low, high in zip(parts[::2], parts[1::2], strict=True)]
            builder.store(parts[0].folded(Numbers.__add__).value, sum_1)
        done = until
    return builder.extract_element(builder.load(sum_1), _INT(0))


def squares_of(builder: ir.IRBuilder, x: Any, count: Any) -> Any:
    """The sum of the squares of a line."""

    def add(i: Any, sums: Numbers) -> Numbers:
        numbers = Numbers.load(builder, x, i, sums.lanes)
        return numbers.times_plus(numbers, sums)

    return summed(builder, count, add)
