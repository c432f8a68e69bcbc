"""Plain attention through torch's scaled-dot-product op. Legend: S sequences, R rows, K keys, H heads, G key heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attend(
    q_SRHD: torch.Tensor, k_SKGD: torch.Tensor, v_SKGD: torch.Tensor, visible_SRK: torch.Tensor, scale: float
) -> torch.Tensor:
    """Returns out_SRHD. A row that sees nothing (padding) has no defined value; callers drop it."""
    out = F.scaled_dot_product_attention(
        q_SRHD.transpose(1, 2),
        k_SKGD.transpose(1, 2),
        v_SKGD.transpose(1, 2),
        attn_mask=visible_SRK[:, None],
        scale=scale,
        enable_gqa=q_SRHD.shape[2] != k_SKGD.shape[2],
    )
    return out.transpose(1, 2)
