"""Paged block attention in Triton.

One program takes a tile of query rows, (rows of one sequence) x (query heads of one key head), and a share of its keys:
cached positions through the page table, then the pack's own rows. Cached keys that every row of the tile sees need no
mask; the rest are masked by the ranges of `Rows`. Where several programs share a tile's keys (`splits`) they leave partial
results, which `combine` adds.

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
from .splits import MOST_SPLITS

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


@triton.jit
def _pages(table, block, pages, N: tl.constexpr, PAGE: tl.constexpr, WHOLE: tl.constexpr):
    """Numbers of the pages that a block of keys lies in: of its two halves where these are pages, else of each of its keys.

    Args:
        pages: columns of the table. WHOLE: the block is cached whole; others may end behind the table.
    """
    last = pages - 1
    if PAGE % N == 0:
        low = tl.load(table + block * N // PAGE)
        high = low
    elif N == 2 * PAGE:
        low = tl.load(table + 2 * block)
        high = tl.load(table + (2 * block + 1 if WHOLE else tl.minimum(2 * block + 1, last)))
    else:
        column = (block * N + tl.arange(0, N)) // PAGE
        low = tl.load(table + (column if WHOLE else tl.minimum(column, last)))
        high = low
    return low, high


@triton.jit
def _places(low, high, block, N: tl.constexpr, PAGE: tl.constexpr):
    """Pool positions of a block of keys, int64, by what `_pages` gave."""
    n = tl.arange(0, N)
    if PAGE % N == 0:
        place = low.to(tl.int64) * PAGE + block * N % PAGE + n
    elif N == 2 * PAGE:
        place = tl.where(n < PAGE, low, high).to(tl.int64) * PAGE + n % PAGE
    else:
        place = low.to(tl.int64) * PAGE + (block * N + n) % PAGE
    return place


@triton.jit(do_not_specialize=["rows", "pages"])
def paged(
    q_ptr, k_ptr, v_ptr, k_pool, v_pool, out_ptr, partial_ptr, lse_ptr, range_ptr, table_ptr, item_ptr,
    q_row, k_row, v_row, rows, pages, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (items, G). The only item of a tile writes the result itself."""
    GROUP: tl.constexpr = H // G
    item, g = tl.program_id(0), tl.program_id(1)
    line = item_ptr + 8 * item
    splits = tl.load(line + 7)
    if splits == 0:
        return
    sequence, first, opening, count = tl.load(line), tl.load(line + 1), tl.load(line + 2), tl.load(line + 3)
    cached, begin, end = tl.load(line + 4), tl.load(line + 5), tl.load(line + 6)

    m = tl.arange(0, M)
    row = opening + m // GROUP
    head = g * GROUP + m % GROUP
    real = (m < M // GROUP * GROUP) & (m // GROUP < count)
    row_T = (first + row).to(tl.int64)
    ranges = range_ptr + row_T
    past_begin = tl.load(ranges, mask=real, other=0)
    past_end = tl.load(ranges + rows, mask=real, other=0)
    clean_begin = tl.load(ranges + 2 * rows, mask=real, other=0)
    clean_end = tl.load(ranges + 3 * rows, mask=real, other=0)
    block_begin = tl.load(ranges + 4 * rows, mask=real, other=0)
    block_end = tl.load(ranges + 5 * rows, mask=real, other=0)

    # The key blocks of this program: cached ones, then the pack's, which follow those of the whole cache.
    seen = tl.max(past_end, 0)
    past_0 = tl.min(tl.where(past_end > past_begin, past_begin, seen), 0) // N
    past_1 = tl.cdiv(seen, N)
    fresh_end = tl.max(tl.maximum(clean_end, block_end), 0)
    fresh_0 = tl.minimum(
        tl.min(tl.where(clean_end > clean_begin, clean_begin, fresh_end), 0),
        tl.min(tl.where(block_end > block_begin, block_begin, fresh_end), 0),
    ) // N  # fmt: skip
    fresh_1 = tl.cdiv(fresh_end, N)
    past_0 = tl.maximum(past_0, begin)
    past_1 = tl.maximum(tl.minimum(past_1, end), past_0)
    fresh_0 = tl.maximum(fresh_0, begin - cached)
    fresh_1 = tl.maximum(tl.minimum(fresh_1, end - cached), fresh_0)
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
    last = tl.maximum(common_1 - 1, 0)
    low, high = _pages(table, tl.minimum(common_0, last), pages, N, PAGE, False)
    for block in range(common_0, common_1):
        place = _places(low, high, block, N, PAGE) * (G * D)
        # The page numbers of the next block are loaded before this block's products, so that its keys do not wait for them.
        low, high = _pages(table, tl.minimum(block + 1, last), pages, N, PAGE, True)
        acc, top, total = _block(
            acc, top, total, q, k_pool + place[None, :] + column[:, None], v_pool + place[:, None] + column[None, :],
            n >= 0, True, scale, False, D, WIDTH, PRECISION,
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
    inside = real[:, None] & (d < D)[None, :]
    if splits == 1:
        place = row_T * H + head
        tl.store(out_ptr + place[:, None] * D + d[None, :], result.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        place = (item.to(tl.int64) * G + g) * M + m
        tl.store(partial_ptr + place[:, None] * D + d[None, :], result, mask=inside)
        lse = tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
        tl.store(lse_ptr + place, lse, mask=real)


@triton.jit
def combine(
    out_ptr, partial_ptr, lse_ptr, tile_ptr,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Grid (most query rows of a tile, tiles, G). Weighs the partial results of one row and head by their share of the softmax's
    total. All of them are loaded at once, and added in one order."""
    GROUP: tl.constexpr = H // G
    m, tile, g = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    line = tile_ptr + 4 * tile
    first, count, item, splits = tl.load(line), tl.load(line + 1), tl.load(line + 2), tl.load(line + 3)
    if (splits == 1) | (m // GROUP >= count):
        return
    s, d = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    place = ((item + s).to(tl.int64) * G + g) * M + m
    lse = tl.load(lse_ptr + place, mask=s < splits, other=float("-inf"))
    part = tl.load(partial_ptr + place[:, None] * D + d[None, :], mask=(s < splits)[:, None] & (d < D)[None, :], other=0.0)
    top = tl.max(lse, 0)
    # A row that sees nothing: any finite number serves.
    weight = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight, 0)
    result = tl.sum(part * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    out = ((first + m // GROUP).to(tl.int64) * H + g * GROUP + m % GROUP) * D
    tl.store(out_ptr + out + d, result.to(out_ptr.dtype.element_ty), mask=d < D)


def paged_attend(
    q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor, k_pool_KGD: torch.Tensor, v_pool_KGD: torch.Tensor,
    rows: Rows, scale: float,
) -> torch.Tensor:  # fmt: skip
    """`blockroll.kernels.attention.paged_attend` on an accelerator."""
    T, H, D = q_THD.shape
    cut, G, device = rows.cut, k_TGD.shape[1], q_THD.device
    tile, tiles, items = cut.tile, len(rows.tile_N4), len(rows.item_I8)
    out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
    width, splits = max(triton.next_power_of_2(D), 16), items > tiles
    partial = torch.empty(items if splits else 0, G, tile.m, D, dtype=torch.float32, device=device)
    lse = torch.empty(partial.shape[:3], dtype=torch.float32, device=device)
    launch(
        paged, (items, G), warps=tile.warps, stages=tile.stages, dot_rows=tile.m, options=tile.options,
        q_ptr=q_THD, k_ptr=k_TGD, v_ptr=v_TGD, k_pool=k_pool_KGD, v_pool=v_pool_KGD, out_ptr=out_THD,
        partial_ptr=partial, lse_ptr=lse, range_ptr=rows.range_6T, table_ptr=rows.table_SP, item_ptr=rows.item_I8,
        q_row=q_THD.stride(0), k_row=k_TGD.stride(0), v_row=v_TGD.stride(0), rows=T, pages=rows.table_SP.shape[1],
        scale=scale * _LOG2_E,
        H=H, G=G, D=D, WIDTH=width, PAGE=rows.page_size, M=tile.m, N=tile.n, PRECISION=precision(q_THD.dtype),
    )  # fmt: skip
    if splits:
        launch(
            combine, (int(cut.count_N.max()) * (H // G), tiles, G), warps=1, out_ptr=out_THD, partial_ptr=partial, lse_ptr=lse,
            tile_ptr=rows.tile_N4, H=H, G=G, D=D, WIDTH=width, M=tile.m, SPLITS=MOST_SPLITS,
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
