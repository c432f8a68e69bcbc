"""Acceptance of drafts, and the draw of the token after them.

Rejection (p: target, q: what the draft d was drawn from, u: uniform numbers):

    accept d  iff  u q(d) < p(d)                                 that is, with probability min(1, p(d) / q(d))
    first rejected row:  x ~ max(p - q, 0) / sum max(p - q, 0)   no mass there: x ~ p
    all accepted:        x ~ p of the row after the last draft

so that each committed token is distributed as p. Source: speculative sampling, arXiv 2211.17192 and 2302.01318.

Matching (x_k: the token the target gives at row k without any draft):

    accept d_k  iff  d_k = x_k;   the first x_k that differs is committed in its place

so that the committed tokens are those of decoding without drafts. With x = argmax(log p + g), g Gumbel noise, x ~ p.
"""

from __future__ import annotations

import torch

from ..dispatch import takes_triton
from ..philox import Purpose
from . import reference
from .reference import (
    Rejection,
    Sampled,
    count_accepted,
    count_matching,
    draw,
    gumbel_argmax,
    mix_logits,
    reject,
    residual_weights,
)

__all__ = [
    "Rejection",
    "Sampled",
    "count_accepted",
    "count_matching",
    "draw",
    "gumbel_argmax",
    "mix_logits",
    "reject",
    "residual_weights",
    "sample_cdf",
    "sample_gumbel",
    "verify_rejection",
]


def sample_gumbel(
    logits_SRV: torch.Tensor,
    temperature_S: torch.Tensor,
    seed_S: torch.Tensor,
    position_S: torch.Tensor,
    excluded: int = -1,
) -> Sampled:
    """argmax(logits / temperature + g) per row, without g at temperature 0; see `reference.sample_gumbel`."""
    if logits_SRV.dtype != torch.float64 and takes_triton(logits_SRV):
        from . import triton as fast

        return fast.sample_gumbel(logits_SRV, temperature_S, seed_S, position_S, excluded)
    return reference.sample_gumbel(logits_SRV, temperature_S, seed_S, position_S, excluded)


def sample_cdf(
    logits_SRV: torch.Tensor,
    temperature_S: torch.Tensor,
    seed_S: torch.Tensor,
    position_S: torch.Tensor,
    excluded: int = -1,
    purpose: int = Purpose.DRAFT,
) -> Sampled:
    """One draw per row by inverse CDF; see `reference.sample_cdf`."""
    if logits_SRV.dtype != torch.float64 and takes_triton(logits_SRV):
        from . import triton as fast

        return fast.sample_cdf(logits_SRV, temperature_S, seed_S, position_S, excluded, purpose)
    return reference.sample_cdf(logits_SRV, temperature_S, seed_S, position_S, excluded, purpose)


def verify_rejection(
    p_logits_SRV: torch.Tensor,
    q_logits_SMV: torch.Tensor,
    q_lse_SM: torch.Tensor,
    draft_SM: torch.Tensor,
    count_S: torch.Tensor,
    temperature_S: torch.Tensor,
    seed_S: torch.Tensor,
    anchor_S: torch.Tensor,
    excluded: int = -1,
    mix_weight_S: torch.Tensor | None = None,
) -> Rejection:
    """Accept drafts and draw the token after them, for `lossless` and, with a mix weight, `mixed`; see
    `reference.verify_rejection`."""
    arguments = (
        p_logits_SRV, q_logits_SMV, q_lse_SM, draft_SM, count_S, temperature_S, seed_S, anchor_S, excluded, mix_weight_S,
    )  # fmt: skip
    if p_logits_SRV.dtype != torch.float64 and takes_triton(p_logits_SRV):
        from . import rejection as fast

        return fast.verify_rejection(*arguments)
    return reference.verify_rejection(*arguments)
