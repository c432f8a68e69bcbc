"""Matrix product with a weight.

    out_t = W x_t + b

The library's product is used except under `batch_invariant`: a library chooses its tiles, and with them the order in which a row
is summed, by the number of rows. `numba.product` with a packed weight has one order of summation on a CPU. `linear_float32` keeps
the sums of 16-bit numbers in float32 (`wide`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..dispatch import batch_invariant, takes_triton
from .wide import linear_float32, linear_float32_into

__all__ = ["linear", "linear_float32", "linear_float32_into"]


def linear(x_TD: torch.Tensor, weight_FD: torch.Tensor, bias_F: torch.Tensor | None = None) -> torch.Tensor:
    """Returns out_TF; any leading shape."""
    if batch_invariant() and x_TD.dtype != torch.float64 and takes_triton(x_TD, weight_FD, bias_F):
        from . import triton as fast

        return fast.linear(x_TD, weight_FD, bias_F)
    return F.linear(x_TD, weight_FD, bias_F)
