"""Residual scaling and RMS norm.

    residual' = (h + b_h) * s_h + (residual + b_r) * s_r        kept in float32 or wider
    y         = w * residual' / sqrt(mean(residual'^2) + eps)   statistics in float32 or wider
"""

from __future__ import annotations

import torch

from ..dispatch import takes_triton
from . import reference

__all__ = ["rms_norm", "scale_residual", "scale_residual_norm"]


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Returns y_TD in the dtype of the weight; any leading shape."""
    if takes_triton(x_TD, weight_D):
        from . import triton as fast

        return fast.rms_norm(x_TD, weight_D, eps)
    return reference.rms_norm(x_TD, weight_D, eps)


def scale_residual(
    hidden_TD: torch.Tensor,
    residual_TD: torch.Tensor,
    hidden_scale_D: torch.Tensor,
    hidden_bias_D: torch.Tensor,
    residual_scale_D: torch.Tensor,
    residual_bias_D: torch.Tensor,
) -> torch.Tensor:
    """Returns the new residual_TD in the residual's dtype."""
    scales = hidden_scale_D, hidden_bias_D, residual_scale_D, residual_bias_D
    if takes_triton(hidden_TD, residual_TD, *scales):
        from . import triton as fast

        return fast.scale_residual(hidden_TD, residual_TD, *scales)
    return reference.scale_residual(hidden_TD, residual_TD, *scales)


def scale_residual_norm(
    hidden_TD: torch.Tensor,
    residual_TD: torch.Tensor,
    hidden_scale_D: torch.Tensor,
    hidden_bias_D: torch.Tensor,
    residual_scale_D: torch.Tensor,
    residual_bias_D: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`scale_residual`, then `rms_norm` of it, in one pass. Returns the new residual_TD and y_TD."""
    scales = hidden_scale_D, hidden_bias_D, residual_scale_D, residual_bias_D
    if takes_triton(hidden_TD, residual_TD, *scales, weight_D):
        from . import triton as fast

        return fast.scale_residual_norm(hidden_TD, residual_TD, *scales, weight_D, eps)
    return reference.scale_residual_norm(hidden_TD, residual_TD, *scales, weight_D, eps)
