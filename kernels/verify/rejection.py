"""Verification by rejection over a large vocabulary in Triton: four launches, and no row of probabilities in memory.

1. of every row with a draft or after one: the chunks' largest target logits and exp-sums (and p's, where they differ);
2. of every draft: its log-probabilities under target and q, and whether it passes;
3. of the row after the accepted drafts: mass of target and of max(target - q, 0) in each chunk;
4. per sequence: the chunk that the uniform number falls into, the token in it, and the verdict.

Invariants: those of `triton.py`. Padding may hold anything, NaN included.

Legend: S sequences, M drafts, R = M + 1 rows, V vocabulary, C chunks of a row, padded to CHUNKS.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..launch import launch
from ..philox.triton import uniform_of
from .chunks import chunks_of, find, finite, normaliser, row_at, scaled_of, strides_of, temperature_of
from .reference import Purpose, Rejection

ACCEPT = tl.constexpr(int(Purpose.ACCEPT))
RESAMPLE = tl.constexpr(int(Purpose.RESAMPLE))


@triton.jit
def _mixed(p_at, q_at, v, weight, temperature, V: tl.constexpr, EXCLUDED: tl.constexpr):
    """Scaled logits of the mixture; exactly p's or q's at its ends."""
    inside = v < V
    p = tl.load(p_at + v, inside, 0).to(tl.float32)
    q = tl.load(q_at + v, inside, 0).to(tl.float32)
    q = tl.where(v == EXCLUDED, float("-inf"), q)
    x = tl.where(weight >= 1, p, tl.where(weight <= 0, q, weight * p + (1 - weight) * q))
    return tl.where(inside, tl.div_rn(x, temperature), float("-inf"))


@triton.jit
def _target(
    p_at, q_at, v, weight, drafted, temperature, V: tl.constexpr, EXCLUDED: tl.constexpr, MIXED: tl.constexpr
):  # fmt: skip
    """Scaled logits of what is sampled from: the mixture in rows with a draft, else p."""
    if MIXED:
        # Where there is no draft, q's row is not read: p stands in for it.
        return _mixed(p_at, q_at, v, tl.where(drafted, weight, 1.0), temperature, V, EXCLUDED)
    return scaled_of(p_at, v, temperature, V, -1)


@triton.jit(do_not_specialize=["R"])
def _chunk_kernel(
    p_SRV, q_SMV, temperature_S, mix_S, count_S, top_C, total_C, p_top_C, p_total_C, p_s_stride, p_r_stride, q_s_stride,
    q_r_stride, R, V: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, EXCLUDED: tl.constexpr,
    MIXED: tl.constexpr,
):  # fmt: skip
    """Grid (S * R, C)."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    s = row // R
    r = row - s * R
    count = tl.load(count_S + s)
    if r > count:
        return
    temperature, _ = temperature_of(temperature_S, s)
    v = chunk * CHUNK + tl.arange(0, CHUNK)
    p_at = row_at(p_SRV, row, p_s_stride, p_r_stride, R)
    p = scaled_of(p_at, v, temperature, V, -1)
    at = row * C + chunk
    top = tl.max(p, 0)
    tl.store(p_top_C + at, top)
    tl.store(p_total_C + at, tl.sum(tl.exp(p - finite(top)).to(tl.float64), 0))
    if MIXED:
        x = p
        if r < count:
            q_at = q_SMV + s.to(tl.int64) * q_s_stride + r.to(tl.int64) * q_r_stride
            x = _mixed(p_at, q_at, v, tl.load(mix_S + s).to(tl.float32), temperature, V, EXCLUDED)
        top = tl.max(x, 0)
        tl.store(top_C + at, top)
        tl.store(total_C + at, tl.sum(tl.exp(x - finite(top)).to(tl.float64), 0))


@triton.jit(do_not_specialize=["R"])
def _accept_kernel(
    p_SRV, q_SMV, q_lse_SM, draft_SM, temperature_S, draft_temperature_S, mix_S, count_S, seed_S, anchor_S, top_C, total_C,
    p_top_C, p_total_C, lse_SR, p_lse_SR, logprob_SR, behavior_SR, pass_SR, p_s_stride, p_r_stride, q_s_stride, q_r_stride,
    R, V: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr, EXCLUDED: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Grid (S * R): normalisers of a row, and whether its draft passes u q(d) < p(d)."""
    row = tl.program_id(0)
    s = row // R
    r = row - s * R
    count = tl.load(count_S + s)
    tl.store(pass_SR + row, 0)
    if r > count:
        return
    _, _, p_lse = normaliser(p_top_C, p_total_C, row * C, C, CHUNKS)
    lse = p_lse
    if MIXED:
        _, _, lse = normaliser(top_C, total_C, row * C, C, CHUNKS)
    tl.store(p_lse_SR + row, p_lse)
    tl.store(lse_SR + row, lse)
    if r < count:
        temperature, _drawn = temperature_of(temperature_S, s)
        draft_at = s * (R - 1) + r
        v = tl.load(draft_SM + draft_at) + tl.arange(0, 1)
        p_at = row_at(p_SRV, row, p_s_stride, p_r_stride, R)
        q_at = q_SMV + s.to(tl.int64) * q_s_stride + r.to(tl.int64) * q_r_stride
        weight = tl.load(mix_S + s).to(tl.float32) if MIXED else 1.0
        logp = scaled_of(p_at, v, temperature, V, -1).to(tl.float64) - p_lse
        target = _target(p_at, q_at, v, weight, True, temperature, V, EXCLUDED, MIXED).to(tl.float64) - lse
        draft_temperature, _drawn = temperature_of(draft_temperature_S, s)
        logq = scaled_of(q_at, v, draft_temperature, V, EXCLUDED).to(tl.float64) - tl.load(q_lse_SM + draft_at)
        position = tl.load(anchor_S + s) + 1 + r + tl.arange(0, 1)
        u = uniform_of(tl.load(seed_S + s), position, tl.full((1,), ACCEPT, tl.int32))
        passes = u < tl.exp(target - logq)
        tl.store(pass_SR + row + tl.arange(0, 1), passes.to(tl.int32))
        tl.store(logprob_SR + row + tl.arange(0, 1), logp.to(tl.float32))
        tl.store(behavior_SR + row + tl.arange(0, 1), target.to(tl.float32))


@triton.jit
def _leading(pass_SR, count, s, R, ROWS: tl.constexpr):
    """How many leading drafts passed."""
    r = tl.arange(0, ROWS)
    passed = tl.load(pass_SR + s * R + r, r < R, 0)
    return tl.min(tl.where((passed == 0) | (r >= count), r, ROWS), 0)


@triton.jit
def _row_chunk(
    p_SRV, q_SMV, q_lse_SM, temperature_S, draft_temperature_S, mix_S, lse_SR, s, a, chunk, drafted, p_s_stride, p_r_stride,
    q_s_stride, q_r_stride, R, V: tl.constexpr, CHUNK: tl.constexpr, EXCLUDED: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """float32 (target, max(target - q, 0)) of one chunk of the row after a accepted drafts."""
    temperature, _ = temperature_of(temperature_S, s)
    v = chunk * CHUNK + tl.arange(0, CHUNK)
    p_at = p_SRV + s.to(tl.int64) * p_s_stride + a.to(tl.int64) * p_r_stride
    # A row without a draft has no q. It reads the first row instead, and the result is not used.
    q_row = tl.where(drafted, a, 0)
    q_at = q_SMV + s.to(tl.int64) * q_s_stride + q_row.to(tl.int64) * q_r_stride
    weight = tl.load(mix_S + s).to(tl.float32) if MIXED else 1.0
    if MIXED:
        x = _target(p_at, q_at, v, weight, drafted, temperature, V, EXCLUDED, MIXED)
    else:
        x = scaled_of(p_at, v, temperature, V, -1)
    p = tl.exp((x.to(tl.float64) - tl.load(lse_SR + s * R + a)).to(tl.float32))
    residual = p
    if drafted:
        draft_temperature, _ = temperature_of(draft_temperature_S, s)
        logq = scaled_of(q_at, v, draft_temperature, V, EXCLUDED).to(tl.float64) - tl.load(q_lse_SM + s * (R - 1) + a)
        residual = tl.maximum(p - tl.exp(logq.to(tl.float32)), 0.0)
    return p, residual


@triton.jit(do_not_specialize=["R"])
def _mass_kernel(
    p_SRV, q_SMV, q_lse_SM, temperature_S, draft_temperature_S, mix_S, count_S, lse_SR, pass_SR, p_mass_C, mass_C, p_s_stride,
    p_r_stride, q_s_stride, q_r_stride, R, ROWS: tl.constexpr, V: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr,
    EXCLUDED: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Grid (S, C)."""
    s, chunk = tl.program_id(0), tl.program_id(1)
    count = tl.load(count_S + s)
    a = _leading(pass_SR, count, s, R, ROWS)
    p, residual = _row_chunk(
        p_SRV, q_SMV, q_lse_SM, temperature_S, draft_temperature_S, mix_S, lse_SR, s, a, chunk, a < count, p_s_stride, p_r_stride,
        q_s_stride, q_r_stride, R, V, CHUNK, EXCLUDED, MIXED,
    )  # fmt: skip
    tl.store(p_mass_C + s * C + chunk, tl.sum(p.to(tl.float64), 0))
    tl.store(mass_C + s * C + chunk, tl.sum(residual.to(tl.float64), 0))


@triton.jit(do_not_specialize=["R"])
def _verdict_kernel(
    p_SRV, q_SMV, q_lse_SM, draft_SM, temperature_S, draft_temperature_S, mix_S, count_S, seed_S, anchor_S, lse_SR, p_lse_SR,
    pass_SR, p_mass_C, mass_C, accepted_S, token_SR, logprob_SR, behavior_SR, p_s_stride, p_r_stride, q_s_stride, q_r_stride,
    R, ROWS: tl.constexpr, V: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    EXCLUDED: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Grid (S)."""
    s = tl.program_id(0)
    count = tl.load(count_S + s)
    a = _leading(pass_SR, count, s, R, ROWS)
    c = tl.arange(0, CHUNKS)
    mass = tl.load(mass_C + s * C + c, c < C, 0.0)
    # No mass: p and q are equal to the last bit, and the rejection was rounding.
    usable = tl.sum(mass, 0) > 0
    mass = tl.where(usable, mass, tl.load(p_mass_C + s * C + c, c < C, 0.0))
    position = tl.load(anchor_S + s) + 1 + a + tl.arange(0, 1)
    u = tl.sum(uniform_of(tl.load(seed_S + s), position, tl.full((1,), RESAMPLE, tl.int32)), 0)
    target = u * tl.sum(mass, 0)
    chunk, before = find(mass, target, 0)
    p, residual = _row_chunk(
        p_SRV, q_SMV, q_lse_SM, temperature_S, draft_temperature_S, mix_S, lse_SR, s, a, chunk, a < count, p_s_stride, p_r_stride,
        q_s_stride, q_r_stride, R, V, CHUNK, EXCLUDED, MIXED,
    )  # fmt: skip
    index, _ = find(tl.where(usable, residual, p).to(tl.float64), target - before, 0)
    token = tl.minimum(chunk * CHUNK + index, V - 1)

    temperature, _ = temperature_of(temperature_S, s)
    p_at = p_SRV + s.to(tl.int64) * p_s_stride + a.to(tl.int64) * p_r_stride
    q_at = q_SMV + s.to(tl.int64) * q_s_stride + tl.where(a < count, a, 0).to(tl.int64) * q_r_stride
    weight = tl.load(mix_S + s).to(tl.float32) if MIXED else 1.0
    v = token + tl.arange(0, 1)
    logp = scaled_of(p_at, v, temperature, V, -1).to(tl.float64) - tl.load(p_lse_SR + s * R + a)
    behavior = logp
    if MIXED:
        behavior = _target(p_at, q_at, v, weight, a < count, temperature, V, EXCLUDED, MIXED).to(tl.float64)
        behavior -= tl.load(lse_SR + s * R + a)

    r = tl.arange(0, ROWS)
    inside, at = r < R, s * R + r
    drafted = r < a
    draft = tl.load(draft_SM + s * (R - 1) + r, drafted, -1)
    draft_logp = tl.load(logprob_SR + at, drafted, 0.0)
    draft_behavior = tl.load(behavior_SR + at, drafted, 0.0)
    tl.store(accepted_S + s, a.to(tl.int64))
    tl.store(token_SR + at, tl.where(drafted, draft, tl.where(r == a, token.to(tl.int64), -1)), inside)
    tl.store(logprob_SR + at, tl.where(drafted, draft_logp, tl.where(r == a, logp.to(tl.float32), 0.0)), inside)
    tl.store(behavior_SR + at, tl.where(drafted, draft_behavior, tl.where(r == a, behavior.to(tl.float32), 0.0)), inside)


def verify_rejection(
    p_logits_SRV: torch.Tensor, q_logits_SMV: torch.Tensor, q_lse_SM: torch.Tensor, draft_SM: torch.Tensor,
    count_S: torch.Tensor, temperature_S: torch.Tensor, seed_S: torch.Tensor, anchor_S: torch.Tensor, excluded: int = -1,
    mix_weight_S: torch.Tensor | None = None, draft_temperature_S: torch.Tensor | None = None,
) -> Rejection:  # fmt: skip
    """As the reference."""
    s, r, vocab_size = p_logits_SRV.shape
    device = p_logits_SRV.device
    chunk, count, chunks, warps = chunks_of(vocab_size)
    mixed = mix_weight_S is not None and r > 1

    def empty(*size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    if r == 1:
        q_logits_SMV = p_logits_SRV  # no row of it counts
    p_top_C, p_total_C = empty(s * r, count, dtype=torch.float32), empty(s * r, count)
    top_C, total_C = (empty(s * r, count, dtype=torch.float32), empty(s * r, count)) if mixed else (p_top_C, p_total_C)
    lse_SR, p_lse_SR, pass_SR = empty(s, r), empty(s, r), empty(s, r, dtype=torch.int32)
    p_mass_C, mass_C = empty(s, count), empty(s, count)
    out = Rejection(
        empty(s, dtype=torch.int64), empty(s, r, dtype=torch.int64), empty(s, r, dtype=torch.float32),
        empty(s, r, dtype=torch.float32),
    )  # fmt: skip
    logits: dict[str, Any] = dict(
        p_SRV=p_logits_SRV, q_SMV=q_logits_SMV, temperature_S=temperature_S,
        mix_S=mix_weight_S if mixed else temperature_S, count_S=count_S, R=r, V=vocab_size, C=count, EXCLUDED=excluded,
        MIXED=mixed, **strides_of(p_logits_SRV, "p_"), **strides_of(q_logits_SMV, "q_"),
    )  # fmt: skip
    drawn: dict[str, Any] = dict(
        q_lse_SM=q_lse_SM.contiguous(),
        draft_temperature_S=temperature_S if draft_temperature_S is None else draft_temperature_S,
    )  # fmt: skip
    keys: dict[str, Any] = dict(draft_SM=draft_SM.contiguous(), seed_S=seed_S, anchor_S=anchor_S, **drawn)
    sums: dict[str, Any] = dict(top_C=top_C, total_C=total_C, p_top_C=p_top_C, p_total_C=p_total_C)
    row: dict[str, Any] = dict(pass_SR=pass_SR, lse_SR=lse_SR)
    result: dict[str, Any] = dict(logprob_SR=out.logprob_SR, behavior_SR=out.behavior_logprob_SR)
    masses: dict[str, Any] = dict(p_mass_C=p_mass_C, mass_C=mass_C, ROWS=triton.next_power_of_2(r), CHUNK=chunk)
    launch(_chunk_kernel, (s * r, count), warps=warps, CHUNK=chunk, **logits, **sums)
    launch(
        _accept_kernel, (s * r,), warps=1, p_lse_SR=p_lse_SR, CHUNKS=chunks, **logits, **keys, **sums, **row, **result
    )
    launch(_mass_kernel, (s, count), warps=warps, **drawn, **logits, **row, **masses)
    launch(
        _verdict_kernel, (s,), warps=warps, p_lse_SR=p_lse_SR, accepted_S=out.accepted_S, token_SR=out.token_SR,
        CHUNKS=chunks, **logits, **keys, **row, **result, **masses,
    )  # fmt: skip
    return out
