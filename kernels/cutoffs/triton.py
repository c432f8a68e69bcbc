"""Cut-offs in Triton: the edge of each row's support is found in four readings of its logits, without a sort or a copy of them.

1. the largest number of each chunk;
2. twice: numbers and weights from each of 16 pivots up, by chunk; then, by row, the part between two pivots in which the edge
   lies is divided again;
3. what lies in that part is gathered, at most `ROOM` numbers;
4. the edge among them, by bisection. A row with more of them than that is bisected where it lies.

Invariants:
- Weights are whole numbers and are added as such, so a row's edge depends on that row alone, to the last bit.
- Memory is bounded by the rows: `ROOM` numbers of each, and 16 sums of each chunk.
- Every loop ends, whatever the logits are: a row of NaN gives some edge.
- No two programs write to one place, and nothing is read in the launch that writes it.

Legend: N = S * R rows, S sequences, R rows of each, V vocabulary, C = ceil(V / CHUNK) chunks, padded to CHUNKS, P pivots.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from ..launch import Case, Shape, launch
from ..verify.chunks import chunks_of, finite, row_at, scaled_of, strides_of, temperature_of
from .bisection import smallest, weigh_above
from .reference import Edges, weight_scale

ROOM = 16384
"""Gathered numbers of a row, a sixteenth of a vocabulary of 262k. Second pivots lie at most 0.33 apart, and 0.15 where a row of
normal logits of deviation 1 is densest, which puts 16k of 262k between two of them."""
_PIVOTS, _TILE = 16, 2048
LAST = tl.constexpr(_PIVOTS - 2)
"""The pivot that is the lower end; the pivot after it is min-p's edge, and pivot 0 is the upper end."""
DEEP = tl.constexpr(64.0)
"""The lowest part, which has no lower end, is divided to this depth."""


@triton.jit
def _weight(x, top, SCALE: tl.constexpr):
    """The whole weight of a number."""
    return (tl.exp(x - top) * SCALE).to(tl.int64)


@triton.jit
def _largest(top_NC, row, C: tl.constexpr, CHUNKS: tl.constexpr):
    c = tl.arange(0, CHUNKS)
    return tl.max(tl.load(top_NC + row * C + c, c < C, float("-inf")), 0)


@triton.jit
def _at(values_P, index):
    """One of 16 numbers."""
    return tl.sum(tl.where(tl.arange(0, 16) == index, values_P, 0), 0)


@triton.jit
def _pivot_at(pivot_P, index):
    """One of the pivots, some of which are infinite."""
    return tl.max(tl.where(tl.arange(0, 16) == index, pivot_P, float("-inf")), 0)


@triton.jit
def _bound(top_p, total):
    """The whole number that the weights before a kept token stay below."""
    return tl.maximum(tl.ceil(top_p * total.to(tl.float64)), 1.0).to(tl.int64)


@triton.jit(do_not_specialize=["R"])
def _top_kernel(
    logits_SRV, temperature_S, top_NC, s_stride, r_stride, R, V: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Grid (N, C)."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    temperature, _ = temperature_of(temperature_S, row // R)
    v = chunk * CHUNK + tl.arange(0, CHUNK)
    x = scaled_of(row_at(logits_SRV, row, s_stride, r_stride, R), v, temperature, V, -1)
    tl.store(top_NC + row * C + chunk, tl.max(x, 0))


@triton.jit(do_not_specialize=["R"])
def _pivot_kernel(
    top_NC, floor_S, pivot_NP, top_N, R, C: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    """Grid (N): the first pivots. They lie closer together near the largest number; -32 is below the smallest weight."""
    row = tl.program_id(0)
    top = _largest(top_NC, row, C, CHUNKS)
    j = tl.arange(0, 16)
    pivot_P = top - j * (j + 1) * 0.1758
    pivot_P = tl.where(j == 0, float("inf"), tl.where(j == LAST, float("-inf"), pivot_P))
    pivot_P = tl.where(j == LAST + 1, top + tl.load(floor_S + row // R), pivot_P)
    tl.store(pivot_NP + row * 16 + j, pivot_P)
    tl.store(top_N + row, finite(top))


@triton.jit(do_not_specialize=["R"])
def _count_kernel(
    logits_SRV, temperature_S, top_N, pivot_NP, mass_NCP, count_NCP, s_stride, r_stride, R,
    SCALE: tl.constexpr, V: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (N, C): weights, and how many numbers, are not below each pivot."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    temperature, _ = temperature_of(temperature_S, row // R)
    v = chunk * CHUNK + tl.arange(0, CHUNK)
    x = scaled_of(row_at(logits_SRV, row, s_stride, r_stride, R), v, temperature, V, -1)
    weight = _weight(x, tl.load(top_N + row), SCALE)
    at = (row * C + chunk) * 16
    for j in tl.static_range(16):
        there = (x >= tl.load(pivot_NP + row * 16 + j)) & (v < V)
        tl.store(mass_NCP + at + j, tl.sum(tl.where(there, weight, 0), 0))
        tl.store(count_NCP + at + j, tl.sum(there.to(tl.int32), 0))


@triton.jit(do_not_specialize=["R"])
def _choose_kernel(
    pivot_NP, mass_NCP, count_NCP, top_k_S, top_p_S, top_N, next_NP, total_N, floor_mass_N, above_N,
    above_mass_N, first_N, end_N, R, FIRST: tl.constexpr, V: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Grid (N): the part in which the edges of top-k and top-p lie, from pivot `end` up to pivot `first`, and pivots in it."""
    row = tl.program_id(0)
    s = row // R
    c, j = tl.arange(0, CHUNKS), tl.arange(0, 16)
    at = row * C * 16 + c[:, None] * 16 + j
    mass_P = tl.sum(tl.load(mass_NCP + at, c[:, None] < C, 0), 0)
    count_P = tl.sum(tl.load(count_NCP + at, c[:, None] < C, 0), 0)
    pivot_P = tl.load(pivot_NP + row * 16 + j)
    top_k, top_p = tl.load(top_k_S + s), tl.load(top_p_S + s)
    if FIRST:
        tl.store(total_N + row, _at(mass_P, LAST))
        tl.store(floor_mass_N + row, _at(mass_P, LAST + 1))
    total = tl.load(total_N + row) if not FIRST else _at(mass_P, LAST)
    part = (j >= 1) & (j <= LAST)
    # Top-k's edge is known up to a part, and so is the sum that top-p's edge depends on: the smallest sum gives the upper end.
    end_k = tl.min(tl.where(part & (count_P >= tl.minimum(top_k, V)), j, LAST), 0)
    kept = tl.where(top_k > 0, _at(mass_P, end_k - 1), total)
    end_p = tl.min(tl.where(part & (mass_P >= _bound(top_p, kept)), j, LAST), 0)
    end = tl.where(top_k > 0, end_k, end_p)
    first = tl.where(top_p < 1, end_p, end_k) - 1
    nothing = (top_k <= 0) & (top_p >= 1)
    first = tl.where(nothing, end, tl.minimum(first, end))
    tl.store(first_N + row, first)
    tl.store(end_N + row, end)
    tl.store(above_N + row, _at(count_P, first))
    tl.store(above_mass_N + row, _at(mass_P, first))
    if FIRST:
        low, high = _pivot_at(pivot_P, end), _pivot_at(pivot_P, first)
        upper = tl.minimum(high, tl.load(top_N + row))
        next_P = upper - (upper - tl.maximum(low, upper - DEEP)) * (j.to(tl.float32) / LAST)
        next_P = tl.where(j == 0, high, tl.where(j == LAST, low, tl.maximum(next_P, low)))
        tl.store(next_NP + row * 16 + j, tl.where(j == LAST + 1, _pivot_at(pivot_P, LAST + 1), next_P))


@triton.jit(do_not_specialize=["R"])
def _gather_kernel(
    logits_SRV, temperature_S, pivot_NP, count_NCP, first_N, end_N, near_N, s_stride, r_stride, R,
    ROOM: tl.constexpr, V: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (N, C): the numbers in the part, chunk after chunk."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    first, end = tl.load(first_N + row), tl.load(end_N + row)
    c = tl.arange(0, CHUNKS)
    at = (row * C + c) * 16
    count_C = tl.load(count_NCP + at + end, c < C, 0) - tl.load(count_NCP + at + first, c < C, 0)
    mine = tl.sum(tl.where(c == chunk, count_C, 0), 0)
    if (mine > 0) & (tl.sum(count_C, 0) <= ROOM):
        temperature, _ = temperature_of(temperature_S, row // R)
        low, high = tl.load(pivot_NP + row * 16 + end), tl.load(pivot_NP + row * 16 + first)
        v = chunk * CHUNK + tl.arange(0, CHUNK)
        x = scaled_of(row_at(logits_SRV, row, s_stride, r_stride, R), v, temperature, V, -1)
        there = (x >= low) & (x < high) & (v < V)
        place = tl.sum(tl.where(c < chunk, count_C, 0), 0) + tl.cumsum(there.to(tl.int32), 0) - 1
        tl.store(near_N + row.to(tl.int64) * ROOM + place, x, there)


@triton.jit(do_not_specialize=["R"])
def _edge_kernel(
    logits_SRV, temperature_S, top_k_S, top_p_S, pivot_NP, near_N, top_N, total_N, floor_mass_N, above_N, above_mass_N,
    count_NCP, first_N, end_N, value_SR, last_SR, logmass_SR, s_stride, r_stride, R,
    ROOM: tl.constexpr, SCALE: tl.constexpr, TILE: tl.constexpr, V: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Grid (N)."""
    row = tl.program_id(0)
    s = row // R
    top, first, end = tl.load(top_N + row), tl.load(first_N + row), tl.load(end_N + row)
    low, high = tl.load(pivot_NP + row * 16 + end), tl.load(pivot_NP + row * 16 + first)
    top_k, top_p = tl.minimum(tl.load(top_k_S + s), V), tl.load(top_p_S + s)
    total, above, above_mass = tl.load(total_N + row), tl.load(above_N + row), tl.load(above_mass_N + row)
    c = tl.arange(0, CHUNKS)
    at = (row * C + c) * 16
    there = tl.sum(tl.load(count_NCP + at + end, c < C, 0) - tl.load(count_NCP + at + first, c < C, 0), 0)
    own = row_at(logits_SRV, row, s_stride, r_stride, R)
    temperature, _ = temperature_of(temperature_S, s)
    near, far = near_N + row.to(tl.int64) * ROOM, there > ROOM
    count = tl.where(far, V, there)
    edge, mass = tl.full((), float("-inf"), tl.float32), total
    room, tied = tl.full((), V, tl.int32), tl.full((), 0, tl.int32)
    if top_k > 0:
        edge = smallest(near, own, far, count, low, high, above, top_k, top, temperature, False, SCALE, TILE)
        more_mass, more, tied = weigh_above(near, own, far, count, edge, high, top, temperature, SCALE, TILE)
        room = (top_k - above - more).to(tl.int32)
        mass = above_mass + more_mass + room * _weight(edge, top, SCALE)
    if top_p < 1:
        bound, edge_k, room_k = _bound(top_p, mass), edge, room
        edge = smallest(near, own, far, count, low, high, above_mass, bound, top, temperature, True, SCALE, TILE)
        more_mass, _more, tied = weigh_above(near, own, far, count, edge, high, top, temperature, SCALE, TILE)
        weight = tl.maximum(_weight(edge, top, SCALE), 1)
        room = tl.minimum((bound - above_mass - more_mass + weight - 1) // weight, V).to(tl.int32)
        room = tl.where(edge == edge_k, tl.minimum(room, room_k), room)
        mass = above_mass + more_mass + room * weight
    floor = tl.load(pivot_NP + row * 16 + LAST + 1)
    if floor > edge:
        edge, room, mass = floor, tied, tl.load(floor_mass_N + row)
    last = tl.full((), V, tl.int32)
    if room < tied:
        before = tl.full((), 0, tl.int32)
        for start in range(0, V, TILE):
            v = start + tl.arange(0, TILE)
            equal = ((scaled_of(own, v, temperature, V, -1) == edge) & (v < V)).to(tl.int32)
            place = before + tl.cumsum(equal, 0)
            last = tl.minimum(last, tl.min(tl.where((equal > 0) & (place == room), v, V), 0))
            before += tl.sum(equal, 0)
    tl.store(value_SR + row, edge)
    tl.store(last_SR + row, last.to(tl.int64))
    tl.store(logmass_SR + row, tl.log(mass.to(tl.float64) / total.to(tl.float64)).to(tl.float32))


@triton.jit(do_not_specialize=["R"])
def _cut_kernel(
    logits_SRV, temperature_S, value_SR, last_SR, s_stride, r_stride, R, V: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Grid (N, C)."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    temperature, _ = temperature_of(temperature_S, row // R)
    v = chunk * CHUNK + tl.arange(0, CHUNK)
    at = row_at(logits_SRV, row, s_stride, r_stride, R)
    x = scaled_of(at, v, temperature, V, -1)
    edge = tl.load(value_SR + row)
    keep = (x > edge) | ((x == edge) & (v <= tl.load(last_SR + row)))
    tl.store(at + v, float("-inf"), (v < V) & (keep == 0))


def edges(
    logits_SRV: torch.Tensor, temperature_S: torch.Tensor, top_k_S: torch.Tensor, top_p_S: torch.Tensor, min_p_S: torch.Tensor
) -> Edges:
    """As the reference. 16-bit logits are widened, which copies them."""
    logits_SRV = logits_SRV.float()
    s, r, vocab_size = logits_SRV.shape
    chunk, count, chunks, warps = chunks_of(vocab_size)

    def empty(*size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(s * r, *size, dtype=dtype, device=logits_SRV.device)

    top, first_pivots, pivots = (empty(size, dtype=torch.float32) for size in (count, _PIVOTS, _PIVOTS))
    mass, numbers = empty(count, _PIVOTS, dtype=torch.int64), empty(count, _PIVOTS, dtype=torch.int32)
    near, largest = empty(ROOM, dtype=torch.float32), empty(dtype=torch.float32)
    cut: dict[str, Any] = dict(V=vocab_size, C=count, R=r)
    logits: dict[str, Any] = dict(logits_SRV=logits_SRV, temperature_S=temperature_S, **cut, **strides_of(logits_SRV))
    sums: dict[str, Any] = dict(mass_NCP=mass, count_NCP=numbers)
    parts: dict[str, Any] = dict(first_N=empty(dtype=torch.int32), end_N=empty(dtype=torch.int32))
    found: dict[str, Any] = dict(
        top_k_S=top_k_S, top_p_S=top_p_S, top_N=largest, above_N=empty(dtype=torch.int32),
        **{name: empty(dtype=torch.int64) for name in ("total_N", "floor_mass_N", "above_mass_N")}, **parts,
    )  # fmt: skip
    n, chunked, scale = (s * r,), (s * r, count), weight_scale(vocab_size)
    launch(_top_kernel, chunked, warps=warps, top_NC=top, CHUNK=chunk, **logits)
    launch(
        _pivot_kernel, n, warps=1, top_NC=top, floor_S=min_p_S.log().float(), pivot_NP=first_pivots, top_N=largest, R=r, C=count,
        CHUNKS=chunks,
    )  # fmt: skip
    for here, first in ((first_pivots, True), (pivots, False)):
        launch(_count_kernel, chunked, warps=warps, top_N=largest, pivot_NP=here, SCALE=scale, CHUNK=chunk, **logits, **sums)
        launch(_choose_kernel, n, pivot_NP=here, next_NP=pivots, FIRST=first, CHUNKS=chunks, **cut, **sums, **found)
    shared: dict[str, Any] = dict(pivot_NP=pivots, near_N=near, count_NCP=numbers, ROOM=ROOM, CHUNKS=chunks)
    launch(_gather_kernel, chunked, warps=warps, CHUNK=chunk, **logits, **parts, **shared)
    kinds = torch.float32, torch.int64, torch.float32
    out = Edges(*(torch.empty(s, r, dtype=kind, device=logits_SRV.device) for kind in kinds))
    launch(
        _edge_kernel, n, warps=8, SCALE=scale, TILE=min(_TILE, chunk), value_SR=out.value_SR, last_SR=out.last_SR,
        logmass_SR=out.logmass_SR, **logits, **found, **shared,
    )  # fmt: skip
    return out


def cut_(logits_SRV: torch.Tensor, temperature_S: torch.Tensor, found: Edges) -> None:
    """As the reference."""
    s, r, vocab_size = logits_SRV.shape
    chunk, count, _, warps = chunks_of(vocab_size)
    strides: dict[str, Any] = {**strides_of(logits_SRV)}
    launch(
        _cut_kernel, (s * r, count), warps=warps, logits_SRV=logits_SRV, temperature_S=temperature_S, value_SR=found.value_SR,
        last_SR=found.last_SR, R=r, V=vocab_size, CHUNK=chunk, **strides,
    )  # fmt: skip


def cases(shape: Shape) -> Iterator[Case]:
    """The verify rows of every batch, whose logits are over 2 GiB in large ones."""
    def empty(*size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    for name, s in {"": min(shape.sequences), " large": 1 << 9}.items():
        logits, temperature, top_k = empty(s, 17, shape.vocab, dtype=torch.float32), empty(s), empty(s, dtype=torch.int64)
        yield Case(f"edges{name}", partial(edges, logits, temperature, top_k, temperature, temperature))
        kinds = torch.float32, torch.int64, torch.float32
        yield Case(f"cut{name}", partial(cut_, logits, temperature, Edges(*(empty(s, 17, dtype=kind) for kind in kinds))))
