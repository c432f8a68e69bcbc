"""Chunks: how the Triton kernels of this folder cut a row of logits, and the functions that both of them call.

Legend: S sequences, R rows of each, V vocabulary, C = ceil(V / CHUNK) chunks, padded to CHUNKS.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LARGEST_CHUNK = 4096


@triton.jit
def scaled_of(row_at, v, temperature, V: tl.constexpr, EXCLUDED: tl.constexpr):
    """float32 logits over the temperature; -inf past the vocabulary and for the excluded token."""
    inside = v < V
    x = tl.div_rn(tl.load(row_at + v, inside, 0).to(tl.float32), temperature)
    return tl.where(inside & (v != EXCLUDED), x, float("-inf"))


@triton.jit
def row_at(logits_SRV, row, s_stride, r_stride, R):
    """Where row `row` of S * R begins."""
    return logits_SRV + (row // R).to(tl.int64) * s_stride + (row % R).to(tl.int64) * r_stride


@triton.jit
def temperature_of(temperature_S, s):
    """(float32 temperature to divide by: 1 for 0; whether it was above 0)."""
    t = tl.load(temperature_S + s).to(tl.float32)
    return tl.where(t > 0, t, 1.0), t > 0


@triton.jit
def finite(top):
    """The number to subtract before exp: `top`, or 0 where `top` is -inf."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def normaliser(top_C, total_C, at, C: tl.constexpr, CHUNKS: tl.constexpr):
    """(largest logit, float64 exp-sum of each chunk relative to it, float64 log-sum-exp) of a row."""
    c = tl.arange(0, CHUNKS)
    top = tl.load(top_C + at + c, c < C, float("-inf"))
    largest = finite(tl.max(top, 0))
    weight = tl.load(total_C + at + c, c < C, 0.0) * tl.exp(top.to(tl.float64) - largest)
    weight = tl.where(c < C, weight, 0.0)
    return largest, weight, largest + tl.log(tl.sum(weight, 0))


@triton.jit
def find(weight, target, fallback):
    """The first index with weight whose running sum exceeds the target, and the sum before it; the last index with weight where
    rounding leaves none, and `fallback` where nothing has weight."""
    i = tl.arange(0, weight.shape[0])
    end = tl.cumsum(weight, 0)
    far = weight.shape[0]
    index = tl.min(tl.where((end > target) & (weight > 0), i, far), 0)
    last = tl.max(tl.where(weight > 0, i, -1), 0)
    index = tl.where(index < far, index, tl.where(last >= 0, last, fallback))
    return index, tl.sum(tl.where(i < index, weight, 0.0), 0)


def chunks_of(vocab_size: int) -> tuple[int, int, int, int]:
    """(CHUNK, C, CHUNKS, warps): how a row is cut."""
    chunk = min(LARGEST_CHUNK, max(16, triton.next_power_of_2(vocab_size)))
    count = triton.cdiv(vocab_size, chunk)
    return chunk, count, triton.next_power_of_2(count), 8 if chunk >= 2048 else 4


def strides_of(logits_SRV: torch.Tensor, name: str = "") -> dict[str, int]:
    """The row strides a kernel takes; slices of sequences and rows need no copy."""
    assert logits_SRV.stride(-1) == 1, "logits of a row lie side by side"
    return {f"{name}s_stride": logits_SRV.stride(0), f"{name}r_stride": logits_SRV.stride(1)}
