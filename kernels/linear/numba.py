"""The product of rows with a weight on a CPU, in one order of summation, compiled by numba.

    out_tf = fma(x_tD, w_Df, ... fma(x_t1, w_1f, fma(x_t0, w_0f, 0)))

Invariants:
- Each output is one chain of multiply-adds over its D features in their order. So it depends on its row and its column of the
  weight alone, to the last bit: neither the number of rows nor a row's place among them takes part, on any processor.
- Multiply-adds are written into the code (`llvm.fma`), not left to the compiler to find: tiles of every size round alike, and
  processors with AVX2 give the bits of those with AVX-512. One without fused multiply-add rounds product and sum, in all tiles.
- Tiles decide the speed only: which chains run side by side in registers.

Weights lie in panels of `WIDTH` columns, those of one feature side by side, with zeros after the last column.

Legend: T rows, D summed features, F output features, P panels, W = `WIDTH` columns of a panel.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..compiled import compiled
from ..lanes import LANES, has

WIDTH = 32
_FLOAT, _LONG = ir.FloatType(), ir.IntType(64)


FUSED = platform.machine() not in ("x86_64", "AMD64") or has("fma")
"""Whether the processor rounds a product and the sum that it goes into once, together."""
ROWS = 8 if LANES == 16 else 6
"""Most rows of a tile, which is made for 32 registers of 16 floats, or 16 of 8. One or two rows wait for the weights, which are
then read once."""


def name() -> str:
    """The product in a few words, for whoever reads a benchmark."""
    return f"fixed order (numba, {LANES} lanes, {'fused' if FUSED else 'plain'} multiply-add)"


def pack(weight_DF: torch.Tensor) -> np.ndarray:
    """panels_PDW of a float32 weight, a copy. Any leading shape stays in front."""
    *lead, _, f = weight_DF.shape
    panels = torch.nn.functional.pad(weight_DF, (0, -f % WIDTH)).unflatten(-1, (-1, WIDTH)).movedim(-2, len(lead))
    return panels.contiguous().numpy()


def _multiply_add(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    if not FUSED:
        return builder.fadd(builder.fmul(a, b), c)
    kind = ir.FunctionType(a.type, [a.type] * 3)
    name = f"llvm.fma.v{a.type.count}{'f32' if a.type.element == _FLOAT else 'f64'}"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [a, b, c])


def _tile(rows: int, wide: bool = False) -> Callable[..., None]:
    """A function of (x_TD, t, depth, weight, at, stride, out_TF, to, f): `depth` features of rows t.. of x times `WIDTH` columns
    of a weight, which begin at its flat place `at` and lie `stride` apart, into rows to.. and columns f.. of out. All arrays are
    contiguous and float32; with `wide` products and sums are float64, and so is out."""
    columns = LANES if wide else WIDTH if LANES == 16 or rows <= 2 else WIDTH // 2
    number = ir.DoubleType() if wide else _FLOAT

    @intrinsic
    def tile(typing_context, x_TD, t, depth, weight, at, stride, out_TF, to, f):
        def generate(context, builder, signature, arguments):
            x, weight, out = (
                context.make_array(signature.args[i])(context, builder, arguments[i]) for i in (0, 3, 6)
            )  # fmt: skip
            x_width, out_width = (cgutils.unpack_tuple(builder, array.shape)[1] for array in (x, out))
            _, t, depth, _, first, stride, _, to, f = arguments
            vector = ir.VectorType(number, columns)
            zero, nothing = ir.Constant(vector, [0.0] * columns), ir.Constant(vector, ir.Undefined)
            everywhere = ir.Constant(ir.VectorType(ir.IntType(32), columns), [0] * columns)

            def at(array: Any, index: Any) -> Any:
                return builder.gep(array, [index])

            def as_vector(pointer: Any, of: Any) -> Any:
                return builder.bitcast(pointer, ir.VectorType(of, columns).as_pointer())

            def widened(loaded: Any, to: Any) -> Any:
                return builder.fpext(loaded, to) if wide else loaded

            x_r = [at(x.data, builder.mul(builder.add(t, _LONG(r)), x_width)) for r in range(rows)]
            out_r = [at(out.data, builder.add(builder.mul(builder.add(to, _LONG(r)), out_width), f)) for r in range(rows)]
            for begin in range(0, WIDTH, columns):
                sums = [cgutils.alloca_once_value(builder, zero) for _ in range(rows)]
                for total in sums:
                    builder.store(zero, total)
                with cgutils.for_range(builder, depth) as loop:
                    place = builder.add(builder.add(first, _LONG(begin)), builder.mul(loop.index, stride))
                    columns_d = widened(builder.load(as_vector(at(weight.data, place), _FLOAT), align=4), vector)
                    for x_D, total in zip(x_r, sums, strict=True):
                        feature = widened(builder.load(at(x_D, loop.index)), number)
                        one = builder.insert_element(nothing, feature, ir.IntType(32)(0))
                        spread = builder.shuffle_vector(one, nothing, everywhere)
                        builder.store(_multiply_add(builder, spread, columns_d, builder.load(total)), total)
                for out_F, total in zip(out_r, sums, strict=True):
                    builder.store(builder.load(total), as_vector(at(out_F, _LONG(begin)), number), align=4)
            return context.get_dummy_value()

        place = types.intp
        return types.void(x_TD, place, place, weight, place, place, out_TF, place, place), generate

    return tile


_tile1, _tile2, _tile3, _tile4, _tile5, _tile6, _tile7, _tile8 = (_tile(min(rows, ROWS)) for rows in range(1, 9))
_wide_tile1, _wide_tile2, _wide_tile4 = (_tile(rows, wide=True) for rows in (1, 2, 4))


@compiled()
def _some(x_TD, t, count, depth, weight, at, stride, out_TF, to, f):
    """A tile of `count` rows."""
    if count == 1:
        _tile1(x_TD, t, depth, weight, at, stride, out_TF, to, f)
    elif count == 2:
        _tile2(x_TD, t, depth, weight, at, stride, out_TF, to, f)
    elif count == 3:
        _tile3(x_TD, t, depth, weight, at, stride, out_TF, to, f)
    elif count == 4:
        _tile4(x_TD, t, depth, weight, at, stride, out_TF, to, f)
    elif count == 5:
        _tile5(x_TD, t, depth, weight, at, stride, out_TF, to, f)
    elif count == 6:
        _tile6(x_TD, t, depth, weight, at, stride, out_TF, to, f)
    elif count == 7:
        _tile7(x_TD, t, depth, weight, at, stride, out_TF, to, f)
    else:
        _tile8(x_TD, t, depth, weight, at, stride, out_TF, to, f)


@compiled()
def _rows_of_a_tile(rows):
    """9 rows are 5 and 4: a tile of few rows is slow."""
    return max(1, -(-rows // max(1, -(-rows // ROWS))))


@compiled()
def product_of(x_TD, begin, end, panels_PDW, out_TF):
    """Writes rows begin..end of out_TF: those rows of x times the weight."""
    depth, features = x_TD.shape[1], out_TF.shape[1]
    whole, each = features // WIDTH, _rows_of_a_tile(end - begin)
    for p in range(whole):
        for t in range(begin, end, each):
            _some(x_TD, t, min(each, end - t), depth, panels_PDW, p * depth * WIDTH, WIDTH, out_TF, t, p * WIDTH)
    if whole < panels_PDW.shape[0]:
        rest_RW = np.empty((ROWS, WIDTH), np.float32)
        for t in range(begin, end, each):
            count = min(each, end - t)
            _some(x_TD, t, count, depth, panels_PDW, whole * depth * WIDTH, WIDTH, rest_RW, 0, 0)
            for r in range(count):
                for f in range(features - whole * WIDTH):
                    out_TF[t + r, whole * WIDTH + f] = rest_RW[r, f]


@compiled()
def product_with_rows(x_TD, rows, depth, weight_DF, first, begin, features, out_TF):
    """Writes the first `rows` rows and `features` columns of out_TF: the first `depth` features of x times a part of a weight
    that is not in panels, from its row `first` and column `begin` on. `features` is a multiple of `WIDTH`."""
    each, stride = _rows_of_a_tile(rows), weight_DF.shape[1]
    for f in range(0, features, WIDTH):
        for t in range(0, rows, each):
            _some(x_TD, t, min(each, rows - t), depth, weight_DF, first * stride + begin + f, stride, out_TF, t, f)


@compiled()
def wide_product_with_rows(x_TD, rows, depth, weight_DF, first, begin, features, out_TF):
    """`product_with_rows` with float64 products and sums, into a float64 out_TF."""
    stride = weight_DF.shape[1]
    for f in range(0, features, WIDTH):
        at = first * stride + begin + f
        for t in range(0, rows // 4 * 4, 4):
            _wide_tile4(x_TD, t, depth, weight_DF, at, stride, out_TF, t, f)
        if rows % 4 >= 2:
            _wide_tile2(x_TD, rows // 4 * 4, depth, weight_DF, at, stride, out_TF, rows // 4 * 4, f)
        if rows % 2:
            _wide_tile1(x_TD, rows - 1, depth, weight_DF, at, stride, out_TF, rows - 1, f)


def product(x_TD: np.ndarray, panels_PDW: np.ndarray, out_TF: np.ndarray) -> None:
    """Writes out_TF = x_TD w_DF. All arrays are float32 and contiguous."""
    product_of(x_TD, 0, len(x_TD), panels_PDW, out_TF)


@compiled()
def products(x_NTD, panels_NPDW, out_NTF):
    """`product` of each of N rows and weights."""
    for n in range(x_NTD.shape[0]):
        product_of(x_NTD[n], 0, x_NTD.shape[1], panels_NPDW[n], out_NTF[n])
