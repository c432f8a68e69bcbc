"""Philox4x32-10 in Triton: draws made where they are used, and whole tensors of them.

Invariants:
- The bits are those of the reference, and the arithmetic on them is float64 as there: a uniform number is equal to the last
  bit, Gumbel noise as far as two libraries' log agrees (cast to float32, nearly always to the last bit too).
- A draw depends on its own key and counter, never on its place in a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl

from ..launch import Case, Shape, launch

_GUMBEL_BLOCK = 1024


@triton.jit
def uniform_of(seed, position, purpose):
    """float64 in (0, 1) for int64 seeds and positions of one shape, and purposes broadcast against them."""
    zero = (position * 0).to(tl.uint32)
    bits, _, _, _ = tl.philox(seed, zero + position.to(tl.uint32), zero + purpose.to(tl.uint32), zero, zero)
    return (bits.to(tl.float64) + 0.5) * 2.3283064365386963e-10


@triton.jit
def _bits_of(seed, position, purpose, first, BLOCK: tl.constexpr):
    """uint32[BLOCK]: the random words of tokens first .. first + BLOCK - 1."""
    block = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = block * 0
    w0, w1, w2, w3 = tl.philox(seed, zero + position.to(tl.uint32), zero + purpose, block, zero)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,))


@triton.jit
def gumbel_of(seed, position, purpose, first, BLOCK: tl.constexpr):
    """float64[BLOCK]: the noise of tokens first .. first + BLOCK - 1, first divisible by 4; seed and position scalar int64."""
    bits = _bits_of(seed, position, purpose, first, BLOCK)
    u = (bits.to(tl.float64) + 0.5) * 2.3283064365386963e-10
    return -tl.log(-tl.log(u))


@triton.jit
def rough_gumbel_of(seed, position, purpose, first, BLOCK: tl.constexpr):
    """`gumbel_of` in float32, within 1e-5 of it and several times as fast. It shows which tokens can win."""
    bits = _bits_of(seed, position, purpose, first, BLOCK)
    u = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    # The winners have u near 1. There float32 is too coarse for u, but exact for w = 1 - u, so -log(1 - w) is summed as a series.
    w = ((bits ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = w * (1 + w * (0.5 + w * (0.33333333 + w * (0.25 + w * (0.2 + w * 0.16666667)))))
    return -tl.log(tl.where(w < 0.125, series, -tl.log(u)))


@triton.jit(do_not_specialize=["n"])
def _uniform_kernel(seed_N, position_N, purpose_N, out_N, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < n
    purpose = tl.load(purpose_N + i, ok, 0)
    tl.store(out_N + i, uniform_of(tl.load(seed_N + i, ok, 0), tl.load(position_N + i, ok, 0), purpose), ok)


@triton.jit
def _gumbel_kernel(seed_R, position_R, out_RV, V: tl.constexpr, PURPOSE: tl.constexpr, BLOCK: tl.constexpr):
    row, first = tl.program_id(0), tl.program_id(1) * BLOCK
    noise = gumbel_of(tl.load(seed_R + row), tl.load(position_R + row), PURPOSE, first, BLOCK)
    v = first + tl.arange(0, BLOCK)
    tl.store(out_RV + row.to(tl.int64) * V + v, noise.to(out_RV.dtype.element_ty), v < V)


def uniform(seed_R: torch.Tensor, position_R: torch.Tensor, purpose: int | torch.Tensor) -> torch.Tensor:
    """As the reference, to the last bit."""
    if not isinstance(purpose, torch.Tensor):
        purpose = torch.full((1,), int(purpose), dtype=torch.int64, device=seed_R.device)
    seed, position, kind = torch.broadcast_tensors(seed_R, position_R, purpose)
    out = torch.empty(seed.shape, dtype=torch.float64, device=seed.device)
    n = out.numel()
    launch(
        _uniform_kernel, (triton.cdiv(n, 256),), seed_N=seed.contiguous(), position_N=position.contiguous(),
        purpose_N=kind.contiguous(), out_N=out, n=n, BLOCK=256,
    )  # fmt: skip
    return out


def gumbel(
    seed_R: torch.Tensor, position_R: torch.Tensor, vocab_size: int, purpose: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """As the reference."""
    seed, position = torch.broadcast_tensors(seed_R, position_R)
    out = torch.empty(*seed.shape, vocab_size, dtype=dtype, device=seed.device)
    launch(
        _gumbel_kernel, (seed.numel(), triton.cdiv(vocab_size, _GUMBEL_BLOCK)), seed_R=seed.contiguous(),
        position_R=position.contiguous(), out_RV=out, V=vocab_size, PURPOSE=int(purpose), BLOCK=_GUMBEL_BLOCK,
    )  # fmt: skip
    return out


def cases(shape: Shape) -> Iterator[Case]:
    """The draws of a verification on torch: uniform numbers, and the noise of its rows."""
    for rows in shape.sequences:
        seed, position = (torch.empty(rows, dtype=torch.int64, device="meta") for _ in range(2))
        yield Case(f"uniform {rows}", partial(uniform, seed, position, 0))
        yield Case(f"gumbel {rows}", partial(gumbel, seed, position, shape.vocab, 0))
