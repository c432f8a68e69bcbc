"""The product of 16-bit numbers whose sums are kept in float32.

    out_t = W x_t + b

A product of two bfloat16 or float16 numbers is exact in float32, and every library sums there. This one does not round the sum
to 16 bits. bfloat16 has 8 binary digits: logits between 16 and 32 would lie 0.125 apart, and many would be equal.

The library's product is used where torch has this one; a Triton kernel elsewhere on an accelerator, and under `batch_invariant`;
the reference on a CPU.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ..dispatch import batch_invariant, takes_triton

_CHUNK = 1 << 22
"""Weights that the reference holds in float32 at once."""


def linear_float32(x_TD: torch.Tensor, weight_FD: torch.Tensor, bias_F: torch.Tensor | None = None) -> torch.Tensor:
    """out_TF, float32, of 16-bit rows and weights; any leading shape. Differentiable."""
    out_TF: torch.Tensor = _Product.apply(x_TD.reshape(-1, x_TD.shape[-1]), weight_FD)
    if bias_F is not None:
        out_TF = out_TF + bias_F.float()
    return out_TF.view(*x_TD.shape[:-1], len(weight_FD))


def linear_float32_into(x_TD: torch.Tensor, weight_FD: torch.Tensor, out_TF: torch.Tensor) -> None:
    """Write the product into `out_TF`, float32 and contiguous. The library writes there itself where it can. Without
    gradients."""
    if not (takes_triton(x_TD, weight_FD) and batch_invariant()) and _library_writes(x_TD.device, x_TD.dtype):
        torch.mm(x_TD, weight_FD.T, out_dtype=torch.float32, out=out_TF)
    else:
        out_TF.copy_(_product(x_TD, weight_FD))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, weight_FD: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_TD, weight_FD)
        return _product(x_TD, weight_FD)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x_TD, weight_FD = ctx.saved_tensors
        gradient_TF = gradients[0].to(weight_FD.dtype)
        return (
            gradient_TF @ weight_FD if ctx.needs_input_grad[0] else None,
            gradient_TF.T @ x_TD if ctx.needs_input_grad[1] else None,
        )


def _product(x_TD: torch.Tensor, weight_FD: torch.Tensor) -> torch.Tensor:
    triton = takes_triton(x_TD, weight_FD)
    if not (triton and batch_invariant()) and _library_has_it(x_TD.device, x_TD.dtype):
        return torch.mm(x_TD, weight_FD.T, out_dtype=torch.float32)
    if triton:
        from . import triton as fast

        return fast.linear(x_TD, weight_FD, dtype=torch.float32)
    return reference(x_TD, weight_FD)


def reference(x_TD: torch.Tensor, weight_FD: torch.Tensor) -> torch.Tensor:
    """The product in torch."""
    wide_TD = x_TD.float()
    at_once = max(_CHUNK // weight_FD.shape[1], 1)
    return torch.cat([wide_TD @ part.float().T for part in weight_FD.split(at_once)], dim=1)


@cache
def _library_has_it(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's product takes `out_dtype` there; asked once, outside of captures, by the pass that warms up."""
    if device.type != "cuda":
        return False
    try:
        few = torch.zeros(16, 16, dtype=dtype, device=device)
        return torch.mm(few, few, out_dtype=torch.float32).dtype == torch.float32
    except (RuntimeError, TypeError):  # of a device without it, of a torch without it
        return False


@cache
def _library_writes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether that product also takes `out`."""
    if not _library_has_it(device, dtype):
        return False
    try:
        few = torch.zeros(16, 16, dtype=dtype, device=device)
        torch.mm(few, few, out_dtype=torch.float32, out=few.float())
    except (RuntimeError, TypeError):  # as above
        return False
    return True
