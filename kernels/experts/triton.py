"""Top-1 grouped experts in Triton: rows sorted by expert on the device, two grouped products, rows back in their order. Decode
steps take two launches, packs of many rows three.

Invariants:
- Nothing is copied to the host: counts stay on the device, the grid is what the worst distribution of rows needs, and each
  program finds its expert from the number of rows per class or ends.
- Every output row is written once: a skipped row with 0, in tiles of their own.
- Output features are the first axis of a product's grid. Where their tiles are a multiple of 8, as those of ZAYA1-8B are,
  the programs that read the same weights are a multiple of 8 apart: on MI300X and MI355X, which deal programs to 8 chiplets
  in turn, they run on one chiplet and share the weights in its L2 cache.
- Rows of a tile share only the weights they read. Under `batch_invariant` tile sizes do not depend on the number of rows
  either, so a row's result does not depend on its batch.

Legend: T rows, D hidden, F inner, E experts, C = E + 1 classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl

from ..launch import Case, Shape, launch, precision
from ..products import tile_product
from .reference import RouterWeights
from .router import route
from .tiles import expert_tiles, options

__all__ = ["cases", "route", "route_top1"]

_SORT_BLOCK = 256
_SORT_INSIDE = 512
"""Rows up to which each program of the first product finds its own: some thousand cycles, less than another launch takes. They grow
with the rows."""


@triton.jit
def _counts(expert_T, start, rows, BLOCK: tl.constexpr, CLASSES: tl.constexpr):
    """(expert of each row of a block, [BLOCK, CLASSES] which class it is)."""
    i = start + tl.arange(0, BLOCK)
    expert = tl.load(expert_T + i, i < rows, -1).to(tl.int32)
    return expert, (expert[:, None] == tl.arange(0, CLASSES)[None, :]).to(tl.int32)


@triton.jit(do_not_specialize=["rows", "blocks"])
def _place_kernel(
    expert_T, order_T, offset_C, rows, blocks, C: tl.constexpr, BLOCK: tl.constexpr, CLASSES: tl.constexpr
):
    """Grid (blocks,). A stable counting sort: order_T[offset_C[c] .. offset_C[c + 1]] are the rows of class c. Every program
    counts all blocks: that takes less time than a launch."""
    block = tl.program_id(0)
    i = block * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, CLASSES)
    total = tl.zeros((CLASSES,), tl.int32)
    before = tl.zeros((CLASSES,), tl.int32)
    for other in range(0, blocks):
        count = tl.sum(_counts(expert_T, other * BLOCK, rows, BLOCK, CLASSES)[1], 0)
        total += count
        before += tl.where(other < block, count, 0)
    end = tl.cumsum(total, 0)
    mine = _counts(expert_T, block * BLOCK, rows, BLOCK, CLASSES)[1]
    rank = tl.cumsum(mine, 0) - 1
    place = tl.sum(mine * (rank + (end - total + before)[None, :]), 1)
    tl.store(order_T + place, i, i < rows)
    if block == 0:
        tl.store(offset_C + c + 1, end, c < C)
        tl.store(offset_C, 0)


@triton.jit
def _tile_of(begin, end, tile, CLASSES: tl.constexpr, M: tl.constexpr):
    """Class of a tile, its first place in the order, and the class's first and last; C or more where there is no such tile.

    Args:
        begin, end: [CLASSES], of each class in the order.
    """
    tiles = (end - begin + M - 1) // M
    done = tl.cumsum(tiles, 0)
    expert = tl.sum((done <= tile).to(tl.int32), 0)
    is_it = tl.arange(0, CLASSES) == expert
    first = tl.sum(tl.where(is_it, begin + (tile - done + tiles) * M, 0), 0)
    return expert, first, tl.sum(tl.where(is_it, begin, 0), 0), tl.sum(tl.where(is_it, end, 0), 0)


@triton.jit
def _rows_of(expert_T, rows, expert, skipped, BLOCK: tl.constexpr, M: tl.constexpr):
    """The first M rows of an expert behind `skipped` of them, in their order; 0 where there are none."""
    m = tl.arange(0, M)
    row = tl.zeros((M,), tl.int32)
    seen = expert * 0
    for start in range(0, rows, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mine = (tl.load(expert_T + i, i < rows, -1).to(tl.int32) == expert).to(tl.int32)
        place = tl.where(mine > 0, seen + tl.cumsum(mine, 0) - 1 - skipped, -1)
        row += tl.sum(tl.where(place[None, :] == m[:, None], i[None, :], 0), 1)
        seen += tl.sum(mine, 0)
    return row


@triton.jit(do_not_specialize=["rows"])
def _gate_up_kernel(
    x_TD, expert_T, order_T, offset_C, gate_up_E2FD, inner_TF, rows, D: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
    CLASSES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, SORT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of output features, tiles of rows). inner = silu(W_gate x) * (W_up x), in sorted order. SORT: each program finds
    its rows itself, and those of the first output features keep the order for the down product; else the order is there."""
    c = tl.arange(0, CLASSES)
    tile = tl.program_id(1)
    if SORT:
        total = tl.zeros((CLASSES,), tl.int32)
        for start in range(0, rows, BLOCK):
            total += tl.sum(_counts(expert_T, start, rows, BLOCK, CLASSES)[1], 0)
        end = tl.cumsum(total, 0)
        begin = end - total
        if (tl.program_id(0) == 0) & (tile == 0):
            tl.store(offset_C + c + 1, end, c <= E)
            tl.store(offset_C, 0)
    else:
        begin, end = tl.load(offset_C + c, c <= E, 0), tl.load(offset_C + c + 1, c <= E, 0)
    expert, first, its_first, last = _tile_of(begin, end, tile, CLASSES, M)
    m = first + tl.arange(0, M)
    real = m < last
    # Padding reads some row: what a row holds reaches no other.
    if SORT:
        if expert > E:
            return
        if (expert == E) & (tl.program_id(0) > 0):
            return
        row = _rows_of(expert_T, rows, expert, first - its_first, BLOCK, M)
        if tl.program_id(0) == 0:
            tl.store(order_T + m, row, real)
        if expert == E:
            return
    else:
        if expert >= E:
            return
        row = tl.load(order_T + tl.where(real, m, first))
    row = row.to(tl.int64)
    dtype = inner_TF.dtype.element_ty
    n = tl.program_id(0) * N + tl.arange(0, N)
    ok = n < F
    x_at = x_TD + row[:, None] * D
    gate_at = gate_up_E2FD + expert.to(tl.int64) * (2 * F * D) + tl.where(ok, n, 0)[None, :] * D
    gate = tl.zeros((M, N), tl.float32)
    up = tl.zeros((M, N), tl.float32)
    for start in range(0, D, K):
        k = start + tl.arange(0, K)
        if D % K:
            inside = k < D
            x = tl.load(x_at + k[None, :], mask=inside[None, :], other=0.0)
            gate_w = tl.load(gate_at + k[:, None], mask=inside[:, None], other=0.0)
            up_w = tl.load(gate_at + F * D + k[:, None], mask=inside[:, None], other=0.0)
        else:
            x = tl.load(x_at + k[None, :])
            gate_w, up_w = tl.load(gate_at + k[:, None]), tl.load(gate_at + F * D + k[:, None])
        gate = tl.dot(x, gate_w, gate, input_precision=PRECISION)
        up = tl.dot(x, up_w, up, input_precision=PRECISION)
    # Rounded where the reference rounds.
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    inner = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up
    tl.store(inner_TF + m.to(tl.int64)[:, None] * F + n[None, :], inner.to(dtype), real[:, None] & ok[None, :])


@triton.jit
def _down_kernel(
    inner_TF, order_T, offset_C, weight_T, down_EDF, out_TD, D: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
    CLASSES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of output features, tiles of rows). out = weight * (W_down inner), in the rows' own order."""
    c = tl.arange(0, CLASSES)
    begin, end = tl.load(offset_C + c, c <= E, 0), tl.load(offset_C + c + 1, c <= E, 0)
    expert, first, _, last = _tile_of(begin, end, tl.program_id(1), CLASSES, M)
    if expert > E:
        return
    m = first + tl.arange(0, M)
    real = m < last
    place = tl.where(real, m, first).to(tl.int64)
    row = tl.load(order_T + place).to(tl.int64)
    n = tl.program_id(0) * N + tl.arange(0, N)
    ok = n < D
    out_at = out_TD + row[:, None] * D + n[None, :]
    inside = real[:, None] & ok[None, :]
    if expert == E:
        tl.store(out_at, tl.zeros((M, N), out_TD.dtype.element_ty), inside)
        return
    inner_at = inner_TF + place[:, None] * F
    down_at = down_EDF + expert.to(tl.int64) * (D * F) + tl.where(ok, n, 0)[None, :] * F
    acc = tile_product(inner_at, down_at, F, M, N, K, PRECISION)
    weight = tl.load(weight_T + row).to(tl.float32)
    out = acc.to(inner_TF.dtype.element_ty).to(tl.float32) * weight[:, None]
    tl.store(out_at, out.to(out_TD.dtype.element_ty), inside)


def route_top1(
    x_TD: torch.Tensor, expert_T: torch.Tensor, weight_T: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """As the reference, with silu."""
    rows, d = x_TD.shape
    experts, f = len(gate_up_E2FD), down_EDF.shape[2]
    out_TD = torch.empty(rows, d, dtype=torch.promote_types(x_TD.dtype, weight_T.dtype), device=x_TD.device)
    if not rows:
        return out_TD
    padded = triton.next_power_of_2(experts + 1)
    expert_T = expert_T.contiguous()
    order_T = torch.empty(rows, dtype=torch.int32, device=x_TD.device)
    offset_C = torch.empty(experts + 2, dtype=torch.int32, device=x_TD.device)
    sort = rows <= _SORT_INSIDE
    if not sort:
        blocks = triton.cdiv(rows, _SORT_BLOCK)
        launch(
            _place_kernel, (blocks,), expert_T=expert_T, order_T=order_T, offset_C=offset_C, rows=rows, blocks=blocks,
            C=experts + 1, BLOCK=_SORT_BLOCK, CLASSES=padded,
        )  # fmt: skip
    inner_TF = torch.empty(rows, f, dtype=x_TD.dtype, device=x_TD.device)
    gate_up, down = expert_tiles(rows, experts, x_TD.dtype)
    tiles = min(rows, rows // gate_up.m + experts + 1)
    shared = dict(order_T=order_T, offset_C=offset_C, D=d, F=f, E=experts, CLASSES=padded, PRECISION=precision(x_TD.dtype))
    launch(
        _gate_up_kernel, (triton.cdiv(f, gate_up.n), tiles), warps=gate_up.warps, stages=gate_up.stages, dot_rows=gate_up.m,
        options=options(), x_TD=x_TD.contiguous(), expert_T=expert_T, gate_up_E2FD=gate_up_E2FD, inner_TF=inner_TF, rows=rows,
        M=gate_up.m, N=gate_up.n, K=gate_up.k, SORT=sort, BLOCK=_SORT_BLOCK, **shared,
    )  # fmt: skip
    launch(
        _down_kernel, (triton.cdiv(d, down.n), tiles), warps=down.warps, stages=down.stages, dot_rows=down.m,
        options=options(), inner_TF=inner_TF, weight_T=weight_T.contiguous(), down_EDF=down_EDF, out_TD=out_TD, M=down.m,
        N=down.n, K=down.k, **shared,
    )  # fmt: skip
    return out_TD


def cases(shape: Shape) -> Iterator[Case]:
    """Every pack size that chooses another tile, by batch and by prefill, free and batch-invariant."""
    from ..dispatch import using

    def empty(*size: int, dtype: torch.dtype = shape.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    d, f, p, e = shape.hidden, shape.ffn, shape.router, shape.experts
    weights = RouterWeights(
        empty(p, d), empty(p), empty(p), empty(p), empty(p, p), empty(p), empty(p, p), empty(p), empty(e + 1, p),
        empty(e + 1, dtype=torch.float32),  # in half precision too
    )  # fmt: skip
    packs = sorted({s * r for s in shape.sequences for r in shape.rows} | {shape.prefill})

    def layer(rows: int, first: bool, invariant: bool) -> None:
        with using(batch_invariant=invariant):
            x = empty(rows, d)
            expert, weight, *_ = route(x, None if first else empty(rows, p), weights, 1e-5)
            route_top1(x, expert, weight, empty(e, 2 * f, d), empty(e, d, f))

    for rows in packs:
        yield Case(f"{rows} rows", partial(layer, rows, False, False))
    yield Case("first layer", partial(layer, packs[0], True, False))
    yield Case("invariant", partial(layer, packs[-1], False, True))
