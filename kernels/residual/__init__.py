"""Residual scaling and RMS norm.

    residual' = (h + b_h) * s_h + (residual + b_r) * s_r        kept in float32 or wider
    y         = w * residual' / sqrt(mean(residual'^2) + eps)   statistics in float32 or wider
"""

from __future__ import annotations

from ..dispatch import dispatched
from . import reference
from .reference import Scales

__all__ = ["Scales", "rms_norm", "scale_residual", "scale_residual_norm"]

rms_norm = dispatched(reference.rms_norm)
scale_residual = dispatched(reference.scale_residual)
scale_residual_norm = dispatched(reference.scale_residual_norm)
