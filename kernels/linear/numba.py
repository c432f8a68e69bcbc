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

from collections.abc import Callable

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..compiled import compiled
from ..lanes import LANES
from ..registers import FUSED, Numbers

WIDTH = 32
STEP = WIDTH // 2
"""Columns of a weight that is not in panels are taken in multiples of it."""
_FLOAT, _LONG = ir.FloatType(), ir.IntType(64)


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


def _tiles(width: int = WIDTH, wide: bool = False, fused: bool = True) -> Callable[..., None]:
    """A function of (x_TD, t, count, depth, weight, at, stride, out_TF, to, f): `depth` features of `count` rows t.. of x, at
    most `ROWS`, times `width` columns of a weight, which begin at its flat place `at` and lie `stride` apart, into rows to.. and
    columns f.. of out. All arrays are contiguous and float32; with `wide` products, sums and out are float64, and x may be.
    Without `fused` products are rounded before they are added."""
    number, most = (ir.DoubleType(), LANES) if wide else (_FLOAT, WIDTH)

    @intrinsic
    def tiles(typing_context, x_TD, t, count, depth, weight, at, stride, out_TF, to, f):
        def generate(context, builder, signature, arguments):
            x, weight, out = (
                context.make_array(signature.args[i])(context, builder, arguments[i]) for i in (0, 4, 7)
            )  # fmt: skip
            x_width, out_width = (cgutils.unpack_tuple(builder, array.shape)[1] for array in (x, out))
            _, t, count, depth, _, first, stride, _, to, f = arguments

            def tile(rows: int) -> None:
                columns = min(width, most if LANES == 16 or rows <= 2 or wide else WIDTH // 2)
                zero = Numbers.all(builder, 0.0, columns, number)
                x_r = [builder.mul(builder.add(t, _LONG(r)), x_width) for r in range(rows)]
                out_r = [builder.add(builder.mul(builder.add(to, _LONG(r)), out_width), f) for r in range(rows)]
                for begin in range(0, width, columns):
                    sums = [cgutils.alloca_once_value(builder, zero.value) for _ in range(rows)]
                    for total in sums:
                        builder.store(zero.value, total)
                    with cgutils.for_range(builder, depth) as loop:
                        place = builder.add(builder.add(first, _LONG(begin)), builder.mul(loop.index, stride))
                        columns_d = Numbers.load(builder, weight.data, place, columns).to(number)
                        for x_D, total in zip(x_r, sums, strict=True):
                            feature = Numbers.load(builder, x.data, builder.add(x_D, loop.index), 1).to(number)
                            spread, before = feature.everywhere(columns), Numbers(builder, builder.load(total))
                            added = spread.times_plus(columns_d, before) if fused else before + spread * columns_d
                            builder.store(added.value, total)
                    for out_F, total in zip(out_r, sums, strict=True):
                        Numbers(builder, builder.load(total)).store(out.data, builder.add(out_F, _LONG(begin)))

            cases = builder.append_basic_block("no rows")
            switch, after = builder.switch(count, cases), cases
            for rows in range(1, ROWS + 1):
                with builder.goto_block(builder.append_basic_block(f"rows {rows}")):
                    switch.add_case(_LONG(rows), builder.block)
                    tile(rows)
                    builder.branch(after)
            builder.position_at_end(after)
            return context.get_dummy_value()

        place = types.intp
        return types.void(x_TD, place, place, place, weight, place, place, out_TF, place, place), generate

    return tiles


_tile, _half_tile, _wide_tile, _plain_tile = _tiles(), _tiles(WIDTH // 2), _tiles(LANES, wide=True), _tiles(fused=False)


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
            _tile(x_TD, t, min(each, end - t), depth, panels_PDW, p * depth * WIDTH, WIDTH, out_TF, t, p * WIDTH)
    if whole < panels_PDW.shape[0]:
        rest_RW = np.empty((ROWS, WIDTH), np.float32)
        for t in range(begin, end, each):
            count = min(each, end - t)
            _tile(x_TD, t, count, depth, panels_PDW, whole * depth * WIDTH, WIDTH, rest_RW, 0, 0)
            for r in range(count):
                for f in range(features - whole * WIDTH):
                    out_TF[t + r, whole * WIDTH + f] = rest_RW[r, f]


@compiled()
def plain_product_of(x_TD, begin, end, panels_PDW, out_TF):
    """`product_of` whose products are rounded before they are added."""
    depth, features, each = x_TD.shape[1], out_TF.shape[1], _rows_of_a_tile(end - begin)
    part_RW = np.empty((ROWS, WIDTH), np.float32)
    for p in range(panels_PDW.shape[0]):
        for t in range(begin, end, each):
            count = min(each, end - t)
            _plain_tile(x_TD, t, count, depth, panels_PDW, p * depth * WIDTH, WIDTH, part_RW, 0, 0)
            for r in range(count):
                for f in range(p * WIDTH, min(features, (p + 1) * WIDTH)):
                    out_TF[t + r, f] = part_RW[r, f - p * WIDTH]


@compiled()
def product_with_rows(x_TD, rows, depth, weight_DF, first, begin, features, out_TF):
    """Writes the first `rows` rows and `features` columns of out_TF: the first `depth` features of x times a part of a weight
    that is not in panels, from its row `first` and column `begin` on. `features` is a multiple of `STEP`."""
    each, stride = _rows_of_a_tile(rows), weight_DF.shape[1]
    whole, at = features // WIDTH * WIDTH, first * stride + begin
    for f in range(0, whole, WIDTH):
        for t in range(0, rows, each):
            _tile(x_TD, t, min(each, rows - t), depth, weight_DF, at + f, stride, out_TF, t, f)
    if whole < features:
        for t in range(0, rows, each):
            _half_tile(x_TD, t, min(each, rows - t), depth, weight_DF, at + whole, stride, out_TF, t, whole)


@compiled()
def wide_product_with_rows(x_TD, rows, depth, weight_DF, first, begin, features, out_TF):
    """`product_with_rows` with float64 products and sums, into a float64 out_TF. x may be float64."""
    each, stride = _rows_of_a_tile(rows), weight_DF.shape[1]
    for f in range(0, features, LANES):
        at = first * stride + begin + f
        for t in range(0, rows, each):
            _wide_tile(x_TD, t, min(each, rows - t), depth, weight_DF, at, stride, out_TF, t, f)


def product(x_TD: np.ndarray, panels_PDW: np.ndarray, out_TF: np.ndarray) -> None:
    """Writes out_TF = x_TD w_DF. All arrays are float32 and contiguous."""
    product_of(x_TD, 0, len(x_TD), panels_PDW, out_TF)


@compiled()
def products(x_NTD, panels_NPDW, out_NTF):
    """`product` of each of N rows and weights."""
    for n in range(x_NTD.shape[0]):
        product_of(x_NTD[n], 0, x_NTD.shape[1], panels_NPDW[n], out_NTF[n])
