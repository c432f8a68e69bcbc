"""Residual scaling and RMS norm in one pass over a row.

Invariants:
- One program per row and one order of reduction per row length: a row's result never depends on its batch.
- Roundings are where the reference has them: the branch in its own dtype, the stream in float32 or wider, the normalised row
  in the weight's dtype before the weight. An accelerator may fuse the stream's product with its sum.

Legend: T = rows, D = features of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl

from ..launch import Case, Shape, launch
from .reference import Scales


@triton.jit
def _residual_kernel(
    hidden_TD, residual_TD, hidden_scale_D, hidden_bias_D, residual_scale_D, residual_bias_D, weight_D, stream_TD, out_TD,
    eps, D: tl.constexpr, BLOCK: tl.constexpr, SCALE: tl.constexpr, NORM: tl.constexpr, ROUND: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """SCALE: residual' of hidden and residual, else residual is normed as it is. ROUND: the branch rounds as hidden_TD."""
    d = tl.arange(0, BLOCK)
    ok = d < D
    at = tl.program_id(0).to(tl.int64) * D + d
    stream = tl.load(residual_TD + at, ok, 0).to(WIDE)
    if SCALE:
        branch = tl.load(hidden_TD + at, ok, 0).to(WIDE) + tl.load(hidden_bias_D + d, ok, 0).to(WIDE)
        if ROUND:
            branch = branch.to(hidden_TD.dtype.element_ty).to(WIDE)
        branch *= tl.load(hidden_scale_D + d, ok, 0).to(WIDE)
        if ROUND:
            branch = branch.to(hidden_TD.dtype.element_ty).to(WIDE)
        stream = (stream + tl.load(residual_bias_D + d, ok, 0).to(WIDE)) * tl.load(residual_scale_D + d, ok, 0).to(WIDE)
        stream = branch + stream
        tl.store(stream_TD + at, stream.to(stream_TD.dtype.element_ty), ok)
    if NORM:
        square = tl.where(ok, stream * stream, 0.0)
        normed = stream / tl.sqrt(tl.sum(square, 0) / D + eps)
        normed = normed.to(out_TD.dtype.element_ty).to(WIDE) * tl.load(weight_D + d, ok, 0).to(WIDE)
        tl.store(out_TD + at, normed.to(out_TD.dtype.element_ty), ok)


def _launch(
    residual: torch.Tensor, hidden: torch.Tensor | None, scales: tuple[torch.Tensor, ...], weight: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """(residual', y); None for what is not wanted. The residual is passed for pointers that the kernel does not use."""
    d = residual.shape[-1]
    residual = residual.contiguous()
    dtype, stream, out = residual.dtype, None, None
    if hidden is not None:
        branch = torch.promote_types(hidden.dtype, scales[0].dtype)
        dtype = torch.promote_types(dtype, branch)
        stream = torch.empty(residual.shape, dtype=dtype, device=residual.device)
    if weight is not None:
        out = torch.empty(residual.shape, dtype=weight.dtype, device=residual.device)
        dtype = torch.promote_types(dtype, weight.dtype)
    hidden_scale, hidden_bias, residual_scale, residual_bias = scales or (residual,) * 4
    launch(
        _residual_kernel, (residual.numel() // d,), warps=1 if d <= 512 else 4 if d <= 4096 else 8,
        hidden_TD=residual if hidden is None else hidden.contiguous(), residual_TD=residual,
        hidden_scale_D=hidden_scale, hidden_bias_D=hidden_bias, residual_scale_D=residual_scale,
        residual_bias_D=residual_bias, weight_D=residual if weight is None else weight,
        stream_TD=residual if stream is None else stream, out_TD=residual if out is None else out, eps=eps, D=d,
        BLOCK=triton.next_power_of_2(d), SCALE=hidden is not None, NORM=weight is not None,
        ROUND=hidden is not None and branch == hidden.dtype, WIDE=tl.float64 if dtype == torch.float64 else tl.float32,
    )  # fmt: skip
    return stream, out


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """As the reference."""
    out = _launch(x_TD, None, (), weight_D, eps)[1]
    assert out is not None
    return out


def scale_residual(hidden_TD: torch.Tensor, residual_TD: torch.Tensor, scales: Scales) -> torch.Tensor:
    """As the reference."""
    stream = _launch(residual_TD, hidden_TD, scales, None, 0.0)[0]
    assert stream is not None
    return stream


def scale_residual_norm(
    hidden_TD: torch.Tensor, residual_TD: torch.Tensor, scales: Scales, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference."""
    stream, out = _launch(residual_TD, hidden_TD, scales, weight_D, eps)
    assert stream is not None and out is not None
    return stream, out


def cases(shape: Shape) -> Iterator[Case]:
    """The residual between two sublayers, the first norm of a pass, and the router's norm."""

    def empty(*size: int, dtype: torch.dtype = shape.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    for name, rows in (("", max(shape.sequences) * max(shape.rows)), (" large", 1 << 19)):
        hidden, residual = empty(rows, shape.hidden), empty(rows, shape.hidden, dtype=torch.float32)
        scales = Scales(*(empty(shape.hidden) for _ in range(4)))
        yield Case("scale and norm" + name, partial(_launch, residual, hidden, scales, scales[0], 1e-5))
        yield Case("scale" + name, partial(scale_residual, hidden, residual, scales))
        yield Case("norm" + name, partial(rms_norm, residual, scales[0], 1e-5))
    yield Case("router norm", partial(rms_norm, empty(1, shape.router), empty(shape.router), 1e-5))
