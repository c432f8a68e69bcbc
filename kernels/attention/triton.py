"""Paged block attention in Triton.

One program takes a tile of query rows, (rows of one sequence) x (query heads of one key head), and a share of its keys:
cached positions through the page table, then the pack's own rows. Cached keys that every row of the tile sees need no
mask; the rest are masked by the ranges of `Rows`. Where several programs share a tile's keys (split-KV, arXiv
2311.01282) they leave partial results that `combine` adds in the order of the keys.

Invariants:
- Offsets into the pool are int64; a position outside every row's range is never loaded, so what unused memory holds
  does not matter.
- Key blocks are cut at multiples of n from position 0, and from the sequence's first row. A block that a row does not see
  changes nothing in its result, to the last bit; so with `batch_invariant` a row's result depends on its own sequence only.
- A row that sees nothing gives 0.

Legend: T rows, H query heads, G key heads, D head size, K pool positions, m and n the tile's sizes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import triton
import triton.language as tl

from ..launch import Case, Shape, launch, precision
from .rows import Rows

_FAR = tl.constexpr(2**31 - 1)
_LOG2_E = 1.4426950408889634


@triton.jit
def _block(
    acc, top, total, q, k_pointers, v_pointers, load, keep, scale,
    MASKED: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One key block into the running (acc, top, total) of the online softmax, in base 2."""
    if WIDTH != D:
        inside = tl.arange(0, WIDTH) < D
        k = tl.load(k_pointers, mask=load[None, :] & inside[:, None], other=0.0)
        v = tl.load(v_pointers, mask=load[:, None] & inside[None, :], other=0.0)
    elif MASKED:
        k = tl.load(k_pointers, mask=load[None, :], other=0.0)
        v = tl.load(v_pointers, mask=load[:, None], other=0.0)
    else:
        k = tl.load(k_pointers)
        v = tl.load(v_pointers)
    score = tl.dot(q, k, input_precision=PRECISION) * scale
    if MASKED:
        score = tl.where(keep, score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 1))
    # Rows that have seen nothing yet: any finite number serves.
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    weight = tl.exp2(score - safe[:, None])
    shrink = tl.exp2(top - safe)
    total = total * shrink + tl.sum(weight, 1)
    acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_top, total


@triton.jit(do_not_specialize=["rows", "pages", "splits", "per_split"])
def paged(
    q_ptr, k_ptr, v_ptr, k_pool, v_pool, out_ptr, partial_ptr, lse_ptr,
    range_ptr, first_ptr, start_ptr, table_ptr, tile_ptr,
    q_row, k_row, v_row, rows, pages, splits, per_split, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, G, splits). A single split writes the result itself."""
    GROUP: tl.constexpr = H // G
    tile, g, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = tl.load(tile_ptr + 2 * tile)
    opening = tl.load(tile_ptr + 2 * tile + 1)
    first = tl.load(first_ptr + sequence)
    count = tl.load(first_ptr + sequence + 1) - first

    m = tl.arange(0, M)
    row = opening + m // GROUP
    head = g * GROUP + m % GROUP
    real = (m < M // GROUP * GROUP) & (row < count)
    row_T = (first + row).to(tl.int64)
    ranges = range_ptr + row_T
    past_begin = tl.load(ranges, mask=real, other=0)
    past_end = tl.load(ranges + rows, mask=real, other=0)
    clean_begin = tl.load(ranges + 2 * rows, mask=real, other=0)
    clean_end = tl.load(ranges + 3 * rows, mask=real, other=0)
    block_begin = tl.load(ranges + 4 * rows, mask=real, other=0)
    block_end = tl.load(ranges + 5 * rows, mask=real, other=0)

    # The key blocks of this program: cached ones, then the pack's.
    seen = tl.max(past_end, 0)
    past_0 = tl.min(tl.where(past_end > past_begin, past_begin, seen), 0) // N
    past_1 = tl.cdiv(seen, N)
    fresh_end = tl.max(tl.maximum(clean_end, block_end), 0)
    fresh_0 = tl.minimum(
        tl.min(tl.where(clean_end > clean_begin, clean_begin, fresh_end), 0),
        tl.min(tl.where(block_end > block_begin, block_begin, fresh_end), 0),
    ) // N  # fmt: skip
    fresh_1 = tl.cdiv(fresh_end, N)
    if per_split > 0:
        per = per_split
        past_origin = 0
        fresh_origin = -tl.cdiv(tl.load(start_ptr + sequence), N)
    else:
        per = tl.cdiv(past_1 - past_0 + fresh_1 - fresh_0, splits)
        past_origin = past_0
        fresh_origin = fresh_0 - (past_1 - past_0)
    begin, end = split * per, (split + 1) * per
    past_0 = tl.maximum(past_0, begin + past_origin)
    past_1 = tl.maximum(tl.minimum(past_1, end + past_origin), past_0)
    fresh_0 = tl.maximum(fresh_0, begin + fresh_origin)
    fresh_1 = tl.maximum(tl.minimum(fresh_1, end + fresh_origin), fresh_0)
    # Of the cached ones, [common_0, common_1) are seen whole by every row.
    common_0 = tl.minimum(tl.maximum(past_0, tl.cdiv(tl.max(past_begin, 0), N)), past_1)
    common_1 = tl.maximum(tl.minimum(past_1, tl.min(tl.where(real, past_end, _FAR), 0) // N), common_0)

    d = tl.arange(0, WIDTH)
    q_place = (row_T * q_row + head * D)[:, None] + d[None, :]
    q = tl.load(q_ptr + q_place, mask=real[:, None] & (d < D)[None, :], other=0.0)
    acc = tl.zeros((M, WIDTH), tl.float32)
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    n = tl.arange(0, N)
    column = g * D + d
    table = table_ptr + sequence.to(tl.int64) * pages
    for block in range(common_0, common_1):
        position = block * N + n
        page = tl.load(table + position // PAGE).to(tl.int64)
        place = (page * PAGE + position % PAGE) * (G * D)
        acc, top, total = _block(
            acc, top, total, q, k_pool + place[None, :] + column[:, None], v_pool + place[:, None] + column[None, :],
            position >= 0, True, scale, False, D, WIDTH, PRECISION,
        )  # fmt: skip
    before = common_0 - past_0
    for i in range(0, before + past_1 - common_1):
        position = tl.where(i < before, past_0 + i, common_1 + i - before) * N + n
        load = position < seen
        page = tl.load(table + position // PAGE, mask=load, other=0).to(tl.int64)
        place = (page * PAGE + position % PAGE) * (G * D)
        keep = (position[None, :] >= past_begin[:, None]) & (position[None, :] < past_end[:, None])
        acc, top, total = _block(
            acc, top, total, q, k_pool + place[None, :] + column[:, None], v_pool + place[:, None] + column[None, :],
            load, keep, scale, True, D, WIDTH, PRECISION,
        )  # fmt: skip
    for block in range(fresh_0, fresh_1):
        key = block * N + n
        key_T = (first + key).to(tl.int64)
        clean = (key[None, :] >= clean_begin[:, None]) & (key[None, :] < clean_end[:, None])
        own = (key[None, :] >= block_begin[:, None]) & (key[None, :] < block_end[:, None])
        acc, top, total = _block(
            acc, top, total, q,
            k_ptr + (key_T * k_row)[None, :] + column[:, None], v_ptr + (key_T * v_row)[:, None] + column[None, :],
            key < fresh_end, clean | own, scale, True, D, WIDTH, PRECISION,
        )  # fmt: skip

    some = total > 0
    result = acc / tl.where(some, total, 1.0)[:, None]
    place = row_T * H + head
    inside = real[:, None] & (d < D)[None, :]
    if splits == 1:
        tl.store(out_ptr + place[:, None] * D + d[None, :], result.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        place += split.to(tl.int64) * rows * H
        tl.store(partial_ptr + place[:, None] * D + d[None, :], result, mask=inside & some[:, None])
        lse = tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
        tl.store(lse_ptr + place, lse, mask=real)


@triton.jit(do_not_specialize=["rows", "splits"])
def combine(
    out_ptr, partial_ptr, lse_ptr, rows, splits, H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr
):
    """Grid (T,). Weighs the partial results of one row by their share of the softmax's total, in the order of the keys."""
    row = tl.program_id(0).to(tl.int64)
    h, d = tl.arange(0, HEADS), tl.arange(0, WIDTH)
    place = row * H + h
    inside = (h < H)[:, None] & (d < D)[None, :]
    stride = rows.to(tl.int64) * H
    top = tl.full((HEADS,), float("-inf"), tl.float32)
    for split in range(splits):
        plane = split * stride
        top = tl.maximum(top, tl.load(lse_ptr + plane + place, mask=h < H, other=float("-inf")))
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, WIDTH), tl.float32)
    for split in range(splits):
        plane = split * stride
        weight = tl.exp2(tl.load(lse_ptr + plane + place, mask=h < H, other=float("-inf")) - top)
        part = tl.load(
            partial_ptr + (plane + place)[:, None] * D + d[None, :], mask=inside & (weight > 0)[:, None], other=0.0
        )
        total += weight
        acc += part * weight[:, None]
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_ptr + place[:, None] * D + d[None, :], result.to(out_ptr.dtype.element_ty), mask=inside)


def paged_attend(
    q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor, k_pool_KGD: torch.Tensor, v_pool_KGD: torch.Tensor,
    rows: Rows, scale: float,
) -> torch.Tensor:  # fmt: skip
    """`blockroll.kernels.attention.paged_attend` on an accelerator."""
    T, H, D = q_THD.shape
    G, tile = k_TGD.shape[1], rows.tile
    out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
    whole, width = rows.splits == 1, max(triton.next_power_of_2(D), 16)
    planes = 0 if whole else rows.splits
    partial = torch.empty(planes, T, H, D, dtype=torch.float32, device=q_THD.device)
    lse = torch.empty(planes, T, H, dtype=torch.float32, device=q_THD.device)
    launch(
        paged, (len(rows.tile_N2), G, rows.splits), warps=tile.warps, stages=tile.stages, dot_rows=tile.m,
        q_ptr=q_THD, k_ptr=k_TGD, v_ptr=v_TGD, k_pool=k_pool_KGD, v_pool=v_pool_KGD, out_ptr=out_THD,
        partial_ptr=partial, lse_ptr=lse, range_ptr=rows.range_6T, first_ptr=rows.first_S1, start_ptr=rows.start_S,
        table_ptr=rows.table_SP, tile_ptr=rows.tile_N2,
        q_row=q_THD.stride(0), k_row=k_TGD.stride(0), v_row=v_TGD.stride(0), rows=T, pages=rows.table_SP.shape[1],
        splits=rows.splits, per_split=rows.per_split, scale=scale * _LOG2_E,
        H=H, G=G, D=D, WIDTH=width, PAGE=rows.page_size, M=tile.m, N=tile.n, PRECISION=precision(q_THD.dtype),
    )  # fmt: skip
    if not whole:
        launch(
            combine, (T,), warps=4, out_ptr=out_THD, partial_ptr=partial, lse_ptr=lse, rows=T, splits=rows.splits,
            H=H, D=D, HEADS=triton.next_power_of_2(H), WIDTH=width,
        )  # fmt: skip
    return out_THD


def cases(shape: Shape) -> Iterator[Case]:
    """Decode steps of every batch and row count, and a prefill chunk; each also batch-invariant and on a large pool."""
    H, G, D = shape.heads, shape.kv_heads, shape.head_dim
    pages = -(-shape.context // shape.page_size)

    def case(sequences: int, count: int, positions: int, invariant: bool) -> Case:
        def call() -> None:
            line = np.tile(np.arange(count), sequences)
            rows = Rows.of(
                np.stack([0 * line, line + 1, 0 * line, 0 * line]), np.arange(sequences + 1) * count, 0 * np.arange(sequences),
                torch.zeros(sequences, pages, dtype=torch.int32), page_size=shape.page_size, heads=H, kv_heads=G,
                dtype=shape.dtype, batch_invariant=invariant, device="meta",
            )  # fmt: skip
            T = sequences * count

            def empty(*size: int) -> torch.Tensor:
                return torch.empty(*size, dtype=shape.dtype, device="meta")

            k_pool, v_pool = empty(positions, G, D), empty(positions, G, D)
            paged_attend(empty(T, H, D), empty(T, G, D), empty(T, G, D), k_pool, v_pool, rows, D**-0.5)

        large = " large" if positions == shape.large_positions else ""
        return Case(f"{sequences} x {count} rows{' invariant' if invariant else ''}{large}", call)

    for positions in (shape.positions, shape.large_positions):
        for invariant in (False, True):
            for count in shape.rows:
                for sequences in shape.sequences:
                    yield case(sequences, count, positions, invariant)
            yield case(1, shape.prefill, positions, invariant)
