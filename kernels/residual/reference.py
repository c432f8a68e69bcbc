"""Plain residual scaling and RMS norm."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Scales(NamedTuple):
    """Scale and bias of a branch and of the residual stream, each [D]."""

    hidden_scale: torch.Tensor
    hidden_bias: torch.Tensor
    residual_scale: torch.Tensor
    residual_bias: torch.Tensor


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Returns y_TD in the dtype of the weight; any leading shape."""
    if x_TD.dtype == weight_D.dtype and x_TD.dtype in (torch.float32, torch.float64):
        return F.rms_norm(x_TD, weight_D.shape, weight_D, eps)
    wide = x_TD.to(torch.promote_types(weight_D.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight_D * wide.to(weight_D.dtype)


def scale_residual(hidden_TD: torch.Tensor, residual_TD: torch.Tensor, scales: Scales) -> torch.Tensor:
    """Returns the new residual_TD in the residual's dtype."""
    hidden_scale_D, hidden_bias_D, residual_scale_D, residual_bias_D = scales
    branch_TD = (hidden_TD + hidden_bias_D) * hidden_scale_D
    if branch_TD.dtype != residual_TD.dtype:
        return branch_TD + (residual_TD + residual_bias_D) * residual_scale_D
    return torch.addcmul(branch_TD, residual_TD + residual_bias_D, residual_scale_D)


def scale_residual_norm(
    hidden_TD: torch.Tensor, residual_TD: torch.Tensor, scales: Scales, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`scale_residual`, then `rms_norm` of its result. A kernel does both in one pass. Returns the new residual_TD and y_TD."""
    residual_TD = scale_residual(hidden_TD, residual_TD, scales)
    return residual_TD, rms_norm(residual_TD, weight_D, eps)
