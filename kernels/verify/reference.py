"""The arithmetic of verification.

Invariants:
- A row's result depends on that row alone.
- Padding (rows past a sequence's count) may hold anything, NaN included: it never reaches a result.

Legend: S = sequences, M = most drafts of one sequence, V = vocabulary; `...` = any leading shape.
"""

from __future__ import annotations

import torch


def gumbel_argmax(score: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """argmax over the last dimension of score + noise; score is log p up to a constant per row. A tie goes to the lower
    token id. Returns int64[...]."""
    return (score + noise).argmax(-1)


def draw(weight: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Inverse-CDF draw over the last dimension.

    Args:
        weight: [..., V], non-negative, not necessarily normalised, with some mass.
        u: float64[...] in (0, 1) with at most 33 binary digits, so that u * total stays below the total.
    Returns: int64[...]; never a token of weight 0. The sum runs in float64: a float32 one would lose rare tokens.
    """
    cdf = weight.cumsum(-1, dtype=torch.float64)
    target = u[..., None] * cdf[..., -1:]
    return torch.searchsorted(cdf, target, right=True)[..., 0].clamp_(max=weight.shape[-1] - 1)


def _leading(ok_SM: torch.Tensor, count_S: torch.Tensor) -> torch.Tensor:
    slot_M = torch.arange(ok_SM.shape[1], device=ok_SM.device)
    return (ok_SM & (slot_M < count_S[:, None])).to(torch.int64).cumprod(-1).sum(-1)


def count_matching(target_SM: torch.Tensor, draft_SM: torch.Tensor, count_S: torch.Tensor) -> torch.Tensor:
    """How many leading drafts equal the target's own tokens. Returns int64[S], at most count_S."""
    return _leading(target_SM == draft_SM, count_S)


def count_accepted(
    logp_SMV: torch.Tensor, logq_SMV: torch.Tensor, draft_SM: torch.Tensor, count_S: torch.Tensor, u_SM: torch.Tensor
) -> torch.Tensor:
    """How many leading drafts pass u < p(d) / q(d). Returns int64[S], at most count_S.

    Args:
        logp_SMV, logq_SMV: normalised; logq is the very distribution the drafts were drawn from.
        draft_SM: int64, -1 in padding.
        u_SM: float64 in (0, 1).
    """
    index_SM1 = draft_SM.clamp(min=0)[..., None]
    log_ratio_SM = (logp_SMV.gather(-1, index_SM1) - logq_SMV.gather(-1, index_SM1))[..., 0]
    return _leading(u_SM < log_ratio_SM.to(torch.float64).exp(), count_S)


def residual_weights(logp_SV: torch.Tensor, logq_SV: torch.Tensor, drafted_S: torch.Tensor) -> torch.Tensor:
    """What to draw the token after the accepted drafts from, up to a constant per row.

    Args:
        drafted_S: bool, whether this row had a draft (which then was rejected); logq_SV is not read where it had none.
    Returns: max(p - q, 0) where drafted, p elsewhere, and p where the difference has no mass at all (p and q are equal
    to the last bit: a rejection there is rounding).
    """
    p_SV = logp_SV.exp()
    residual_SV = (p_SV - logq_SV.exp()).clamp_(min=0)
    use_S = drafted_S & (residual_SV.sum(-1) > 0)
    return torch.where(use_S[:, None], residual_SV, p_SV)


def mix_logits(p_logits: torch.Tensor, q_logits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """w * p_logits + (1 - w) * q_logits, where a weight of 1 gives exactly p_logits and a weight of 0 exactly q_logits,
    also for tokens whose other logit is -inf (0 * inf would be NaN). weight broadcasts over the last dimension."""
    weight = weight[..., None].to(p_logits.dtype)
    mixed = weight * p_logits + (1 - weight) * q_logits
    return torch.where(weight >= 1, p_logits, torch.where(weight <= 0, q_logits, mixed))
