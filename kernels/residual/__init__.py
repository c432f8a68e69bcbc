"""Residual scaling and RMS norm.

    residual' = (h + b_h) * s_h + (residual + b_r) * s_r        kept in float32 or wider
    y         = w * residual' / sqrt(mean(residual'^2) + eps)   statistics in float32 or wider
"""

from .reference import rms_norm, scale_residual

__all__ = ["rms_norm", "scale_residual"]
