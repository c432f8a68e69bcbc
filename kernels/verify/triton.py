"""Sampling from rows of logits over a large vocabulary in Triton, reading each logit once or twice and copying none.

A row is cut into chunks; one program per row and chunk leaves the chunk's largest logit, the sum of its exponentials and its
best noisy logit, and one program per row puts the chunks together.

Invariants:
- Chunks depend on the vocabulary alone, so a row's result depends on that row alone, to the last bit.
- Sums that a draw is compared with are float64, of float32 exponentials; a tie goes to the lower token id.
- A row of NaN gives some token of the vocabulary.

Legend: S sequences, R rows of each, V vocabulary, C = ceil(V / CHUNK) chunks, padded to CHUNKS.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from ..launch import Case, Shape, launch
from ..philox.triton import gumbel_of, rough_gumbel_of, uniform_of
from .chunks import chunks_of, find, finite, normaliser, row_at, scaled_of, strides_of, temperature_of
from .reference import Purpose, Sampled
from .rejection import verify_rejection


@triton.jit(do_not_specialize=["R"])
def _chunk_kernel(
    logits_SRV, temperature_S, seed_S, position_S, top_C, total_C, score_C, best_C, s_stride, r_stride, R,
    V: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, EXCLUDED: tl.constexpr, PURPOSE: tl.constexpr,
    NOISE: tl.constexpr,
):  # fmt: skip
    """Grid (S * R, C)."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    s = row // R
    temperature, drawn = temperature_of(temperature_S, s)
    v = chunk * CHUNK + tl.arange(0, CHUNK)
    x = scaled_of(row_at(logits_SRV, row, s_stride, r_stride, R), v, temperature, V, EXCLUDED)
    top = tl.max(x, 0)
    at = row * C + chunk
    tl.store(top_C + at, top)
    tl.store(total_C + at, tl.sum(tl.exp(x - finite(top)).to(tl.float64), 0))
    if NOISE:
        best, score = tl.argmax(x, 0), top
        if drawn:
            seed, position = tl.load(seed_S + s), tl.load(position_S + s) + row % R
            rough = x + rough_gumbel_of(seed, position, PURPOSE, chunk * CHUNK, CHUNK)
            best, score = tl.argmax(rough, 0), tl.max(rough, 0)
            # Only one token can win, unless another is closer to it than the error of the rough noise and of its sum.
            margin = 1e-4 + 1e-6 * tl.abs(score)
            if tl.sum((rough >= score - margin).to(tl.int32), 0) == 1:
                x_best = tl.sum(tl.where(v == chunk * CHUNK + best, x, 0.0), 0)
                lane = tl.arange(0, 4)
                noise = gumbel_of(seed, position, PURPOSE, chunk * CHUNK + best // 4 * 4, 4)
                score = x_best + tl.sum(tl.where(lane == best % 4, noise, 0.0), 0).to(tl.float32)
            else:
                x += gumbel_of(seed, position, PURPOSE, chunk * CHUNK, CHUNK).to(tl.float32)
                best, score = tl.argmax(x, 0), tl.max(x, 0)
        tl.store(score_C + at, score)
        tl.store(best_C + at, chunk * CHUNK + best)


@triton.jit(do_not_specialize=["R"])
def _gumbel_kernel(
    logits_SRV, temperature_S, top_C, total_C, score_C, best_C, token_SR, logprob_SR, lse_SR, s_stride, r_stride,
    R, V: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Grid (S * R): the best of the chunks' best."""
    row = tl.program_id(0)
    at = row * C
    _, _, lse = normaliser(top_C, total_C, at, C, CHUNKS)
    c = tl.arange(0, CHUNKS)
    chunk = tl.minimum(tl.argmax(tl.load(score_C + at + c, c < C, float("-inf")), 0), C - 1)
    token = tl.minimum(tl.load(best_C + at + chunk), V - 1)
    temperature, _ = temperature_of(temperature_S, row // R)
    x = tl.div_rn(tl.load(row_at(logits_SRV, row, s_stride, r_stride, R) + token).to(tl.float32), temperature)
    tl.store(token_SR + row, token.to(tl.int64))
    tl.store(logprob_SR + row, (x.to(tl.float64) - lse).to(tl.float32))
    tl.store(lse_SR + row, lse)


@triton.jit(do_not_specialize=["R"])
def _cdf_kernel(
    logits_SRV, temperature_S, seed_S, position_S, top_C, total_C, token_SR, logprob_SR, lse_SR, s_stride, r_stride,
    R, V: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    EXCLUDED: tl.constexpr, PURPOSE: tl.constexpr,
):  # fmt: skip
    """Grid (S * R): the chunk that the uniform number falls into, then the token in it."""
    row = tl.program_id(0)
    s = row // R
    at = row * C
    largest, weight, lse = normaliser(top_C, total_C, at, C, CHUNKS)
    purpose = tl.full((1,), PURPOSE, tl.int32)
    position = tl.load(position_S + s) + row % R
    u = tl.sum(uniform_of(tl.load(seed_S + s), position + purpose * 0, purpose), 0)
    target = u * tl.sum(weight, 0)
    chunk, before = find(weight, target, 0)
    temperature, _ = temperature_of(temperature_S, s)
    v = chunk * CHUNK + tl.arange(0, CHUNK)
    x = scaled_of(row_at(logits_SRV, row, s_stride, r_stride, R), v, temperature, V, EXCLUDED)
    inner = tl.exp(x - finite(tl.max(x, 0))).to(tl.float64)
    inner *= tl.exp(finite(tl.max(x, 0)).to(tl.float64) - largest)
    index, _ = find(inner, target - before, 0)
    token = tl.minimum(chunk * CHUNK + index, V - 1)
    x = tl.div_rn(tl.load(row_at(logits_SRV, row, s_stride, r_stride, R) + token).to(tl.float32), temperature)
    tl.store(token_SR + row, token.to(tl.int64))
    tl.store(logprob_SR + row, (x.to(tl.float64) - lse).to(tl.float32))
    tl.store(lse_SR + row, lse)


def _sample(
    logits_SRV: torch.Tensor, temperature_S: torch.Tensor, seed_S: torch.Tensor, position_S: torch.Tensor,
    excluded: int, purpose: int, noise: bool,
) -> Sampled:  # fmt: skip
    s, r, vocab_size = logits_SRV.shape
    device = logits_SRV.device
    chunk, count, chunks, warps = chunks_of(vocab_size)
    top = torch.empty(s * r, count, dtype=torch.float32, device=device)
    total = torch.empty(s * r, count, dtype=torch.float64, device=device)
    score = torch.empty(s * r, count, dtype=torch.float32, device=device) if noise else top
    best = torch.empty(s * r, count, dtype=torch.int32, device=device) if noise else top
    shared: dict[str, Any] = dict(
        logits_SRV=logits_SRV, temperature_S=temperature_S, top_C=top, total_C=total, R=r, V=vocab_size,
        C=count, **strides_of(logits_SRV),
    )  # fmt: skip
    keyed: dict[str, Any] = dict(seed_S=seed_S, position_S=position_S, CHUNK=chunk, EXCLUDED=excluded, PURPOSE=purpose)
    launch(_chunk_kernel, (s * r, count), warps=warps, score_C=score, best_C=best, NOISE=noise, **shared, **keyed)
    out = Sampled(
        torch.empty(s, r, dtype=torch.int64, device=device),
        torch.empty(s, r, dtype=torch.float32, device=device),
        torch.empty(s, r, dtype=torch.float64, device=device),
    )
    shared |= dict(token_SR=out.token_SR, logprob_SR=out.logprob_SR, lse_SR=out.lse_SR, CHUNKS=chunks)
    if noise:
        launch(_gumbel_kernel, (s * r,), warps=1, score_C=score, best_C=best, **shared)
    else:
        launch(_cdf_kernel, (s * r,), warps=warps, **shared, **keyed)
    return out


def sample_gumbel(
    logits_SRV: torch.Tensor, temperature_S: torch.Tensor, seed_S: torch.Tensor, position_S: torch.Tensor,
    excluded: int = -1,
) -> Sampled:  # fmt: skip
    """As the reference."""
    return _sample(logits_SRV, temperature_S, seed_S, position_S, excluded, int(Purpose.NOISE), True)


def sample_cdf(
    logits_SRV: torch.Tensor, temperature_S: torch.Tensor, seed_S: torch.Tensor, position_S: torch.Tensor,
    excluded: int = -1, purpose: int = Purpose.DRAFT,
) -> Sampled:  # fmt: skip
    """As the reference."""
    return _sample(logits_SRV, temperature_S, seed_S, position_S, excluded, int(purpose), False)


def cases(shape: Shape) -> Iterator[Case]:
    """What samplers launch for the verify rows of every batch, and for the drafts they draw."""
    def empty(*size: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    v, block = shape.vocab, 16
    packs = {"": min(shape.sequences), " large": 1 << 9}
    for name, s in packs.items():
        temperature, seed, lse = empty(s, dtype=torch.float64), empty(s), empty(s, block, dtype=torch.float64)
        p, q = empty(s, block + 1, v, dtype=torch.float32), empty(s, block, v, dtype=torch.float32)
        for sampler in (sample_gumbel, sample_cdf):
            yield Case(
                f"{sampler.__name__}{name}",
                partial(sampler, q, temperature, seed, seed, v - 1),
            )
        for kind, mix in (("lossless", None), ("mixed", temperature)):
            yield Case(
                f"{kind}{name}",
                partial(verify_rejection, p, q, lse, lse.long(), seed, temperature, seed, seed, v - 1, mix),
            )
