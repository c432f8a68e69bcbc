"""The product under `batch_invariant`. Its tiles and order of summation are fixed, so a row's result depends on that row and the
weight alone.

Legend: T rows, D summed features, F output features.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl

from ..launch import Case, Shape, launch, pipeline, precision
from ..products import tile_product


@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(
    x_TD, weight_FD, bias_F, out_TF, rows, D: tl.constexpr, F: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of rows, tiles of output features)."""
    m = tl.program_id(0) * M + tl.arange(0, M)
    n = tl.program_id(1) * N + tl.arange(0, N)
    real, ok = m < rows, n < F
    x_at = x_TD + tl.where(real, m, 0).to(tl.int64)[:, None] * D
    w_at = weight_FD + tl.where(ok, n, 0).to(tl.int64)[None, :] * D
    acc = tile_product(x_at, w_at, D, M, N, K, PRECISION)
    if BIAS:
        acc += tl.load(bias_F + n, ok, 0).to(tl.float32)[None, :]
    at = out_TF + m.to(tl.int64)[:, None] * F + n[None, :]
    tl.store(at, acc.to(out_TF.dtype.element_ty), real[:, None] & ok[None, :])


def linear(
    x_TD: torch.Tensor, weight_FD: torch.Tensor, bias_F: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """As `blockroll.kernels.linear.linear`.

    Args:
        dtype: of the result; None for that of `x_TD`.
    """
    f, d = weight_FD.shape
    flat = x_TD.reshape(-1, d).contiguous()
    out = torch.empty(len(flat), f, dtype=dtype or x_TD.dtype, device=x_TD.device)
    k = 64 if x_TD.dtype.itemsize == 2 else 32
    launch(
        _linear_kernel, (triton.cdiv(len(flat), 64), triton.cdiv(f, 64)), warps=4, stages=pipeline(3), dot_rows=64,
        x_TD=flat, weight_FD=weight_FD, bias_F=weight_FD if bias_F is None else bias_F, out_TF=out, rows=len(flat), D=d,
        F=f, M=64, N=64, K=k, BIAS=bias_F is not None, PRECISION=precision(x_TD.dtype),
    )  # fmt: skip
    return out.view(*x_TD.shape[:-1], f)


def cases(shape: Shape) -> Iterator[Case]:
    """The projections into and out of attention, and the vocabulary head."""

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=shape.dtype, device="meta")

    d, wide = shape.hidden, shape.heads * shape.head_dim
    for name, rows, out, summed in (("in", 1, wide, d), ("out", 1, d, wide), ("head", 1 << 13, shape.vocab, d)):
        dtype = torch.float32 if name == "head" else None
        yield Case(name, partial(linear, empty(rows, summed), empty(out, summed), dtype=dtype))
