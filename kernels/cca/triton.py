"""CCA in Triton: everything between the projections and attention in one launch, two where a prompt is prefilled.

One program takes a tile of rows and one head: the convolutions of its D channels as products of matrices, the means, the
norm, RoPE, and the row's key in the cache. One more program per tile makes the values. The channels of a head are summed
in two products, whose columns are the two channels of a pair that RoPE turns (the channels that it leaves pair up too), so
that RoPE needs no exchange between threads.

Invariants:
- A tail entry is written in the launch that reads it only where no row reads an entry that another one writes
  (`Places.apart`).
- Rows of a tile share only the weights they read. Under `batch_invariant` the tile does not depend on the number of rows
  either, so a row's result does not depend on its batch.
- Sums run in float32 and round once, at the end.
- Offsets into the pools of keys and values are int64; those into the pack and the tail fit 32 bits, which halves the
  registers of their pointers.

Legend: T rows, A ancestors, C channels, H query heads, G key heads, D head size, P rotary features, W width of the delayed
value, N tail entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from ..dispatch import batch_invariant, using
from ..launch import Case, Shape, architecture, launch, pipeline, precision
from .places import Places, Pools
from .reference import CCAInputs, CCAWeights, taps_apart


@triton.jit
def _gather(pack, pool, source, row_stride, width, column, inside, TAIL: tl.constexpr):
    """float32 columns of each source: a row of the pack, a tail entry, or 0."""
    x = tl.load(
        pack + (source * row_stride)[:, None] + column[None, :],
        mask=(source >= 0)[:, None] & inside[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    if TAIL:
        x += tl.load(
            pool + ((-2 - source) * width)[:, None] + column[None, :],
            mask=(source < -1)[:, None] & inside[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
    return x


@triton.jit
def _mean(x_at, head, first, count, n, inside, D: tl.constexpr):
    """Half the sum of the head's own projection and the mean of `count` heads from `first` on."""
    own = tl.load(x_at[:, None] + (head * D + n)[None, :], mask=inside, other=0.0).to(tl.float32)
    others = own * 0.0
    for i in range(count):
        others += tl.load(x_at[:, None] + ((first + i) * D + n)[None, :], mask=inside, other=0.0).to(tl.float32)
    return 0.5 * (own + others / count)


@triton.jit
def _value(
    current_TW, delayed_TW, delayed_pool, v_pool, before_W, v_TC, source, write, tail, row, real, current_row,
    delayed_row, W: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr, KEEP: tl.constexpr, KEEP_TAIL: tl.constexpr,
    BEFORE: tl.constexpr,
):  # fmt: skip
    """A tile's values, and its delayed ones in the tail."""
    w = tl.arange(0, WIDTH)
    ok = w < W
    inside = real[:, None] & ok[None, :]
    current = tl.load(current_TW + (row * current_row)[:, None] + w[None, :], mask=inside, other=0.0)
    previous = _gather(delayed_TW, delayed_pool, source, delayed_row, W, w, ok, TAIL)
    if BEFORE:
        bias = tl.load(before_W + w, ok, 0).to(tl.float32)
        previous = tl.where((source == -1)[:, None], bias[None, :], previous)
    previous = previous.to(current.dtype)
    at = v_TC + (row * (2 * W))[:, None] + w[None, :]
    tl.store(at, current, mask=inside)
    tl.store(at + W, previous, mask=inside)
    if KEEP:
        at = v_pool + (write.to(tl.int64) * (2 * W))[:, None] + w[None, :]
        kept = inside & (write >= 0)[:, None]
        tl.store(at, current, mask=kept)
        tl.store(at + W, previous, mask=kept)
    if KEEP_TAIL:
        own = tl.load(delayed_TW + (row * delayed_row)[:, None] + w[None, :], mask=inside, other=0.0)
        at = delayed_pool + (tail.to(tl.int64) * W)[:, None] + w[None, :]
        tl.store(at, own, mask=inside & (tail >= 0)[:, None])


@triton.jit(do_not_specialize=["rows"])
def _cca_kernel(
    x_TC, current_TW, delayed_TW, source_TA, write_T, tail_T, k_pool, v_pool, x_pool, delayed_pool,
    depthwise_CJ, depthwise_bias_C, grouped_COI, grouped_bias_C, temperature_G, before_W, cos_TP, sin_TP,
    q_THD, k_TGD, v_TC, rows, x_row, current_row, delayed_row, length,
    DEPTH_IN: tl.constexpr, DEPTH_TAP: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, TAP: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, P: tl.constexpr, W: tl.constexpr, WIDTH: tl.constexpr,
    TIME0: tl.constexpr, TIME1: tl.constexpr, M: tl.constexpr, K: tl.constexpr, PAIRS: tl.constexpr,
    TAIL: tl.constexpr, KEEP: tl.constexpr, KEEP_TAIL: tl.constexpr, BEFORE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of rows, H + G + 1). `length` is sqrt(D). DEPTH_IN, DEPTH_TAP, OUT, IN, TAP: strides of the convolutions'
    weights."""
    A: tl.constexpr = TIME0 + TIME1 - 1
    C: tl.constexpr = (H + G) * D
    GROUP: tl.constexpr = H // G
    head = tl.program_id(1)
    m = tl.program_id(0) * M + tl.arange(0, M)
    real = m < rows
    row = m.to(tl.int64)
    write, tail = m * 0 - 1, m * 0 - 1
    if KEEP:
        write = tl.load(write_T + m, real, -1)
    if KEEP_TAIL:
        tail = tl.load(tail_T + m, real, -1)
    if head == H + G:
        parent = tl.load(source_TA + row * A + 1, real, -1)
        _value(
            current_TW, delayed_TW, delayed_pool, v_pool, before_W, v_TC, parent, write, tail, row, real, current_row,
            delayed_row, W, WIDTH, TAIL, KEEP, KEEP_TAIL, BEFORE,
        )  # fmt: skip
        return

    # Pairs of channels: those that RoPE turns together, then those of the first and second half of the rest.
    pair = tl.arange(0, PAIRS)
    turned = pair < P // 2
    low = tl.where(turned, pair, P // 2 + pair)
    high = low + tl.where(turned, P // 2, (D - P + 1) // 2)
    low_ok, high_ok = pair < P // 2 + (D - P + 1) // 2, high < D
    left = tl.zeros((M, PAIRS), tl.float32)
    right = tl.zeros((M, PAIRS), tl.float32)
    for start in range(0, D, K):
        k = start + tl.arange(0, K)
        ok = k < D
        channel = head * D + k
        bias = tl.load(depthwise_bias_C + channel, ok, 0).to(tl.float32)
        for h in tl.static_range(TIME1):
            y = tl.zeros((M, K), tl.float32) + bias[None, :]
            for j in tl.static_range(TIME0):
                source = tl.load(source_TA + row * A + h + j, real, -1)
                x = _gather(x_TC, x_pool, source, x_row, C, channel, ok, TAIL)
                tap = tl.load(depthwise_CJ + channel * DEPTH_IN + (TIME0 - 1 - j) * DEPTH_TAP, ok, 0).to(tl.float32)
                y += x * tap[None, :]
            y = y.to(x_TC.dtype.element_ty)
            # [in, out] of this head's matrix of tap h.
            w_at = grouped_COI + head * (D * OUT) + (TIME1 - 1 - h) * TAP + (k * IN)[:, None]
            w = tl.load(w_at + low[None, :] * OUT, mask=ok[:, None] & low_ok[None, :], other=0.0)
            left = tl.dot(y, w, left, input_precision=PRECISION)
            w = tl.load(w_at + high[None, :] * OUT, mask=ok[:, None] & high_ok[None, :], other=0.0)
            right = tl.dot(y, w, right, input_precision=PRECISION)

    is_q = head < H
    g = tl.where(is_q, head // GROUP, head - H)
    first = tl.where(is_q, H + g, g * GROUP)
    count = tl.where(is_q, 1, GROUP)
    x_at = x_TC + m * x_row
    low_in, high_in = real[:, None] & low_ok[None, :], real[:, None] & high_ok[None, :]
    bias_at = grouped_bias_C + head * D
    left += tl.load(bias_at + low, low_ok, 0).to(tl.float32)[None, :] + _mean(x_at, head, first, count, low, low_in, D)
    right += tl.load(bias_at + high, high_ok, 0).to(tl.float32)[None, :] + _mean(x_at, head, first, count, high, high_in, D)
    scale = length / tl.maximum(tl.sqrt(tl.sum(left * left + right * right, 1)), 1.1920928955078125e-07)
    scale *= tl.where(is_q, 1.0, tl.load(temperature_G + g).to(tl.float32))
    left, right = left * scale[:, None], right * scale[:, None]
    turn_at, turn_in = (row * P)[:, None] + pair[None, :], real[:, None] & turned[None, :]
    cos = tl.load(cos_TP + turn_at, mask=turn_in, other=1.0).to(tl.float32)
    sin = tl.load(sin_TP + turn_at, mask=turn_in, other=0.0).to(tl.float32)
    left, right = (left * cos - right * sin).to(q_THD.dtype.element_ty), (right * cos + left * sin).to(q_THD.dtype.element_ty)
    if is_q:
        at = q_THD + (row * (H * D) + head * D)[:, None]
        tl.store(at + low[None, :], left, mask=low_in)
        tl.store(at + high[None, :], right, mask=high_in)
    else:
        at = k_TGD + (row * (G * D) + g * D)[:, None]
        tl.store(at + low[None, :], left, mask=low_in)
        tl.store(at + high[None, :], right, mask=high_in)
        if KEEP:
            at = k_pool + (write.to(tl.int64) * (G * D) + g * D)[:, None]
            kept = (write >= 0)[:, None]
            tl.store(at + low[None, :], left, mask=low_in & kept)
            tl.store(at + high[None, :], right, mask=high_in & kept)
    if KEEP_TAIL:
        c = tl.arange(0, 2 * PAIRS)
        inside = (tail >= 0)[:, None] & (c < D)[None, :]
        x = tl.load(x_TC + (m * x_row)[:, None] + (head * D + c)[None, :], mask=inside, other=0.0)
        tl.store(x_pool + (tail.to(tl.int64) * C + head * D)[:, None] + c[None, :], x, mask=inside)


@triton.jit
def _tail_kernel(
    x_TC, delayed_TW, tail_T, x_pool, delayed_pool, x_row, delayed_row, C: tl.constexpr, W: tl.constexpr,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid (T,): a row's tail entry."""
    row = tl.program_id(0).to(tl.int64)
    tail = tl.load(tail_T + row).to(tl.int64)
    if tail < 0:
        return
    c, w = tl.arange(0, CHANNELS), tl.arange(0, WIDTH)
    tl.store(x_pool + tail * C + c, tl.load(x_TC + row * x_row + c, c < C, 0), c < C)
    tl.store(delayed_pool + tail * W + w, tl.load(delayed_TW + row * delayed_row + w, w < W, 0), w < W)


_FEW_ROWS = 416
"""Up to here tiles have 16 rows: one for each head (11 of ZAYA1-8B) and 16 rows are no more programs than MI300X has compute
units, and one program fills a unit's LDS with the loads of all channels."""


def _tile(rows: int, size: int, apart: bool) -> tuple[int, int]:
    """(rows of a tile, channels summed at once), by whether the weights' taps lie apart. 64 channels at once spill with 64 rows
    on gfx942; with 16 rows on sm_90 so do 32 of weights as they come, under one Triton or another."""
    m = 64 if rows > _FEW_ROWS or batch_invariant() else 16
    most = 32
    if m == 16 and apart:
        most = 64
    elif m == 16 and architecture().startswith("sm_"):
        most = 16
    return m, min(most, max(16, triton.next_power_of_2(size)))


def cca(
    inputs: CCAInputs, places: Places, pools: Pools | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the reference; projections and values may be columns of one wider tensor."""
    x_TC, current_TW, delayed_TW, weights, cos_TP, sin_TP = inputs
    rows, device, dtype = len(x_TC), x_TC.device, x_TC.dtype
    g, d, p = len(weights.temperature_G), weights.grouped_weight.shape[1], cos_TP.shape[-1]
    h, w = x_TC.shape[1] // d - g, delayed_TW.shape[1]
    time0, time1 = weights.depthwise_weight.shape[-1], weights.grouped_weight.shape[-1]
    q_THD = torch.empty(rows, h, d, dtype=dtype, device=device)
    k_TGD, v_TGD = (torch.empty(rows, g, d, dtype=dtype, device=device) for _ in range(2))
    keep = pools is not None
    assert rows * max(x_TC.stride(0), h * d) < 1 << 31, "offsets into a pack are 32 bits"
    k_pool, v_pool, x_pool, delayed_pool = pools if pools is not None else (k_TGD, v_TGD, x_TC, delayed_TW)
    assert x_pool.numel() <= 1 << 31, "offsets into the tail are 32 bits"
    strides: dict[str, Any] = dict(x_row=x_TC.stride(0), delayed_row=delayed_TW.stride(0))
    entries: dict[str, Any] = dict(
        x_TC=x_TC, delayed_TW=delayed_TW, tail_T=places.tail_T, x_pool=x_pool, delayed_pool=delayed_pool, W=w
    )
    width = max(16, triton.next_power_of_2(w))
    depthwise, grouped = weights.depthwise_weight.stride(), weights.grouped_weight.stride()
    m, k = _tile(rows, d, grouped[1] == 1)
    # Triton 3.6 spills scalar registers of a prefill's tile to gfx942's stack where four warps share it.
    warps = 8 if m == 64 and keep and places.apart and architecture().startswith("gfx") else 4
    launch(
        _cca_kernel, (triton.cdiv(rows, m), h + g + 1), warps=warps, stages=pipeline(3), dot_rows=m,
        current_TW=current_TW, source_TA=places.source_TA, write_T=places.write_T, k_pool=k_pool, v_pool=v_pool,
        depthwise_CJ=weights.depthwise_weight, depthwise_bias_C=weights.depthwise_bias,
        grouped_COI=weights.grouped_weight, grouped_bias_C=weights.grouped_bias, temperature_G=weights.temperature_G,
        before_W=weights.temperature_G if weights.before_W is None else weights.before_W,
        cos_TP=cos_TP.contiguous(), sin_TP=sin_TP.contiguous(), q_THD=q_THD, k_TGD=k_TGD, v_TC=v_TGD, rows=rows,
        current_row=current_TW.stride(0), length=d**0.5, DEPTH_IN=depthwise[0], DEPTH_TAP=depthwise[2], OUT=grouped[0],
        IN=grouped[1], TAP=grouped[2], H=h, G=g, D=d, P=p, WIDTH=width, TIME0=time0, TIME1=time1,
        M=m, K=k, PAIRS=max(16, triton.next_power_of_2(p // 2 + (d - p + 1) // 2)),
        TAIL=keep, KEEP=keep, KEEP_TAIL=keep and not places.apart, BEFORE=weights.before_W is not None,
        PRECISION=precision(dtype), **strides, **entries,
    )  # fmt: skip
    if keep and places.apart:
        launch(
            _tail_kernel, (rows,), warps=4, C=x_TC.shape[1], CHANNELS=triton.next_power_of_2(x_TC.shape[1]), WIDTH=width,
            **strides, **entries,
        )  # fmt: skip
    return q_THD, k_TGD, v_TGD


def cases(shape: Shape) -> Iterator[Case]:
    """Decode steps with few and many rows, a prefill chunk, and a pack without a cache; each over a small and a large pool."""
    h, g, d, p = shape.heads, shape.kv_heads, shape.head_dim, shape.rotary
    channels, w, ancestors = (h + g) * d, g * d // 2, sum(shape.conv) - 1

    def empty(*size: int, dtype: torch.dtype = shape.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    def case(rows: int, positions: int, apart: bool, invariant: bool, packed: bool = True) -> None:
        # As an engine lays them out, and as they come.
        depthwise, grouped = empty(channels, 1, shape.conv[0]), empty(channels, d, shape.conv[1])
        if packed:
            depthwise, grouped = taps_apart(depthwise), taps_apart(grouped)
        weights = CCAWeights(depthwise, empty(channels), grouped, empty(channels), empty(g), None)
        index = empty(rows, ancestors, dtype=torch.int32)
        places = Places(index, index[:, 0].contiguous(), index[:, 0].contiguous(), apart)
        entries = max(shape.sequences) * 2 * (max(shape.rows) + ancestors)
        pools = Pools(empty(positions, g, d), empty(positions, g, d), empty(entries, channels), empty(entries, w))
        # x, current and delayed lie side by side where the projections are one product.
        x, current, delayed = empty(rows, channels + 2 * w).split([channels, w, w], dim=1)
        with using(batch_invariant=invariant):
            inputs = CCAInputs(x, current, delayed, weights, empty(rows, p), empty(rows, p))
            cca(inputs, places, pools if positions else None)

    for rows in (1, max(shape.sequences) * max(shape.rows)):
        for positions, name in ((shape.positions, ""), (shape.large_positions, " large"), (0, " without a cache")):
            yield Case(f"{rows} rows{name}", partial(case, rows, positions, False, False))
    yield Case("prefill", partial(case, shape.prefill, shape.positions, True, False))
    yield Case("weights as they come", partial(case, 1, shape.positions, False, False, False), apart=True)
    yield Case("invariant", partial(case, 1, shape.positions, False, True))
