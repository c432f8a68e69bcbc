"""The arithmetic of verification.

Invariants:
- A row's result depends on that row alone.
- Padding (rows past a sequence's count) may hold anything, NaN included: it never reaches a result.

Legend: S = sequences, M = most drafts of one sequence, R = rows of a sequence, V = vocabulary; `...` = any leading shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..philox.reference import Purpose, gumbel, uniform


class Sampled(NamedTuple):
    """A token per row.

    Attributes:
        token_SR: int64. logprob_SR: float32, its log-probability at the temperature (0: at 1), nothing cut.
        lse_SR: float64, log-sum-exp of the row over the temperature: logit / temperature - lse is a log-probability.
    """

    token_SR: torch.Tensor
    logprob_SR: torch.Tensor
    lse_SR: torch.Tensor


class Rejection(NamedTuple):
    """Drafts verified by rejection. Rows past accepted_S hold -1 in token_SR and 0 in the logarithms.

    Attributes:
        accepted_S: int64, how many drafts were accepted. token_SR: int64, they and the token after them.
        logprob_SR: float32, log p at the temperature. behavior_logprob_SR: float32, under what was sampled from.
    """

    accepted_S: torch.Tensor
    token_SR: torch.Tensor
    logprob_SR: torch.Tensor
    behavior_logprob_SR: torch.Tensor

    @classmethod
    def empty(cls, sequences: int, rows: int) -> Rejection:
        """On the host, for S sequences of R rows; holds anything."""
        token_SR = torch.empty((sequences, rows), dtype=torch.int64)
        logprob_SR, behavior_SR = torch.empty((2, sequences, rows), dtype=torch.float32)
        return cls(torch.empty(sequences, dtype=torch.int64), token_SR, logprob_SR, behavior_SR)


@dataclass(frozen=True, slots=True)
class PairTable:
    """What a token adds to the logits of the row after it, for every pair of a small vocabulary: pair_VV[before, after]."""

    pair_VV: torch.Tensor

    def __call__(self, previous: torch.Tensor) -> torch.Tensor:
        """int64[...] tokens to [..., V]."""
        return F.embedding(previous, self.pair_VV)


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
    """Weights that the token after the accepted drafts is drawn by, up to a constant per row.

    Args:
        drafted_S: bool, whether this row had a draft (which then was rejected); logq_SV is not read where it had none.
    Returns: max(p - q, 0) where drafted, p elsewhere, and p where the difference has no mass at all (p and q are equal
    to the last bit: a rejection there is rounding).
    """
    p_SV = logp_SV.exp()
    residual_SV = (p_SV - logq_SV.exp()).clamp_(min=0)
    use_S = drafted_S & (residual_SV.sum(-1) > 0)
    return torch.where(use_S[:, None], residual_SV, p_SV)


def reject(
    logp_SRV: torch.Tensor,
    logq_SMV: torch.Tensor | None,
    draft_SM: torch.Tensor,
    count_S: torch.Tensor,
    seed_S: torch.Tensor,
    anchor_S: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many drafts pass, and the token after them: (accepted_S, x_S), both int64.

    Args:
        logp_SRV: the target's rows, normalised, R = M + 1; row r is that of position anchor + 1 + r.
        logq_SMV: what the drafts were drawn from, normalised; None where there are none.
        draft_SM: int64, -1 in padding. count_S: int64, real drafts of each sequence. seed_S, anchor_S: int64.
    """
    s, r, _ = logp_SRV.shape
    device = logp_SRV.device
    position_SR = anchor_S[:, None] + 1 + torch.arange(r, device=device)
    # `full` fills on the device; a tensor made of host numbers would be copied to it.
    purpose_211 = torch.cat([torch.full((1, 1, 1), p, device=device) for p in (Purpose.ACCEPT, Purpose.RESAMPLE)])
    u_accept_SR, u_resample_SR = uniform(seed_S[:, None], position_SR, purpose_211)
    if r == 1 or logq_SMV is None:
        return torch.zeros_like(count_S), draw(logp_SRV[:, 0].exp(), u_resample_SR[:, 0])
    accepted_S = count_accepted(logp_SRV[:, :-1], logq_SMV, draft_SM, count_S, u_accept_SR[:, :-1])
    s_S = torch.arange(s, device=device)
    logq_SV = logq_SMV[s_S, accepted_S.clamp(max=r - 2)]
    weight_SV = residual_weights(logp_SRV[s_S, accepted_S], logq_SV, accepted_S < count_S)
    return accepted_S, draw(weight_SV, u_resample_SR[s_S, accepted_S])


def mix_logits(p_logits: torch.Tensor, q_logits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """w * p_logits + (1 - w) * q_logits, where a weight of 1 gives exactly p_logits and a weight of 0 exactly q_logits,
    also for tokens whose other logit is -inf (0 * inf would be NaN). weight broadcasts over the last dimension."""
    weight = weight[..., None].to(p_logits.dtype)
    mixed = weight * p_logits + (1 - weight) * q_logits
    return torch.where(weight >= 1, p_logits, torch.where(weight <= 0, q_logits, mixed))


def _scaled(logits_SRV: torch.Tensor, temperature_S: torch.Tensor, excluded: int) -> torch.Tensor:
    """Logits over the temperature (0 counts as 1), float32 or wider, -inf for the excluded token."""
    wide_SRV = logits_SRV.to(torch.promote_types(logits_SRV.dtype, torch.float32))
    temperature_S = torch.where(temperature_S > 0, temperature_S, 1.0).to(wide_SRV.dtype)
    wide_SRV = wide_SRV / temperature_S[:, None, None]
    if excluded >= 0:
        wide_SRV[..., excluded] = -torch.inf
    return wide_SRV


def _sampled(scaled_SRV: torch.Tensor, token_SR: torch.Tensor) -> Sampled:
    lse_SR = scaled_SRV.to(torch.float64).logsumexp(-1)
    logprob_SR = scaled_SRV.gather(-1, token_SR[..., None])[..., 0] - lse_SR
    return Sampled(token_SR, logprob_SR.to(torch.float32), lse_SR)


def sample_gumbel(
    logits_SRV: torch.Tensor, temperature_S: torch.Tensor, seed_S: torch.Tensor, position_S: torch.Tensor,
    excluded: int = -1,
) -> Sampled:  # fmt: skip
    """argmax(logits / temperature + g), g keyed by (seed, position, `Purpose.NOISE`); without g at temperature 0.

    Args:
        logits_SRV: raw; the last dimension lies side by side in memory.
        temperature_S: float, >= 0. seed_S: int64, non-negative.
        position_S: int64, position of row 0; row r stands for position_S + r.
        excluded: a token of probability zero; -1 for none.
    """
    scaled_SRV = _scaled(logits_SRV, temperature_S, excluded)
    r, vocab_size = logits_SRV.shape[1:]
    position_SR = position_S[:, None] + torch.arange(r, device=position_S.device)
    noise_SRV = gumbel(seed_S[:, None], position_SR, vocab_size, Purpose.NOISE, scaled_SRV.dtype)
    noise_SRV = torch.where(temperature_S[:, None, None] > 0, noise_SRV, 0.0)
    return _sampled(scaled_SRV, gumbel_argmax(scaled_SRV, noise_SRV))


def sample_cdf(
    logits_SRV: torch.Tensor, temperature_S: torch.Tensor, seed_S: torch.Tensor, position_S: torch.Tensor,
    excluded: int = -1, purpose: int = Purpose.DRAFT,
) -> Sampled:  # fmt: skip
    """One draw per row by inverse CDF, with a uniform number keyed by (seed, position, purpose); arguments as for
    `sample_gumbel`, temperatures above 0."""
    scaled_SRV = _scaled(logits_SRV, temperature_S, excluded)
    position_SR = position_S[:, None] + torch.arange(logits_SRV.shape[1], device=position_S.device)
    u_SR = uniform(seed_S[:, None], position_SR, int(purpose))
    return _sampled(scaled_SRV, draw(torch.softmax(scaled_SRV, -1), u_SR))


def verify_rejection(
    p_logits_SRV: torch.Tensor, q_logits_SMV: torch.Tensor, q_lse_SM: torch.Tensor, draft_SM: torch.Tensor,
    count_S: torch.Tensor, temperature_S: torch.Tensor, seed_S: torch.Tensor, anchor_S: torch.Tensor, excluded: int = -1,
    mix_weight_S: torch.Tensor | None = None, draft_temperature_S: torch.Tensor | None = None,
) -> Rejection:  # fmt: skip
    """Accept drafts with min(1, p / q), and draw the token after them from the residual.

    Args:
        p_logits_SRV: raw logits of the verify rows, R = M + 1; row r is p of position anchor + 1 + r.
        q_logits_SMV, q_lse_SM: what the drafts were drawn from: raw logits, and `Sampled.lse_SR` of that draw.
        draft_SM: int64, -1 in padding. count_S: int64, real drafts of each sequence. Rows past it may hold anything.
        temperature_S: float, above 0. seed_S, anchor_S: int64.
        excluded: the token q gives probability zero; p is never altered.
        mix_weight_S: float in [0, 1]; None: the target is p. Else softmax((w p_logits + (1 - w) q_logits) / temperature) in
            rows with a draft, and p after them.
        draft_temperature_S: float, above 0: the temperature at which the drafts were drawn; None: temperature_S. The mixture does
            not depend on it.
    """
    r = p_logits_SRV.shape[1]
    m, row_R = r - 1, torch.arange(r, device=p_logits_SRV.device)
    logp_SRV = torch.log_softmax(_scaled(p_logits_SRV, temperature_S, -1), -1)
    q_scaled_SMV = _scaled(q_logits_SMV, temperature_S if draft_temperature_S is None else draft_temperature_S, excluded)
    logq_SMV = (q_scaled_SMV - q_lse_SM[..., None]).to(logp_SRV.dtype)
    target_SRV = logp_SRV
    if mix_weight_S is not None and m:
        wide_SMV = p_logits_SRV[:, :m].to(q_scaled_SMV.dtype)
        q_wide_SMV = q_logits_SMV.to(q_scaled_SMV.dtype).masked_fill(torch.isneginf(q_scaled_SMV), -torch.inf)
        mixed_SMV = _scaled(mix_logits(wide_SMV, q_wide_SMV, mix_weight_S[:, None]), temperature_S, -1)
        drafted_SM = row_R[:m] < count_S[:, None]
        mixed_SMV = torch.where(drafted_SM[..., None], torch.log_softmax(mixed_SMV, -1), logp_SRV[:, :m])
        target_SRV = torch.cat((mixed_SMV, logp_SRV[:, m:]), 1)
    accepted_S, x_S = reject(target_SRV, logq_SMV, draft_SM, count_S, seed_S, anchor_S)
    draft_SR = torch.cat((draft_SM, x_S[:, None]), 1)
    token_SR = draft_SR.where(row_R != accepted_S[:, None], x_S[:, None]).where(row_R <= accepted_S[:, None], -1)

    def at_token(logp: torch.Tensor) -> torch.Tensor:
        value_SR = logp.gather(-1, token_SR.clamp(min=0)[..., None])[..., 0]
        return torch.where(token_SR >= 0, value_SR, 0.0).to(torch.float32)

    return Rejection(accepted_S, token_SR, at_token(logp_SRV), at_token(target_SRV))


def logprobs(logits_NV: torch.Tensor, token_N: torch.Tensor, temperature_N: torch.Tensor) -> torch.Tensor:
    """log softmax(logits / temperature) at one token per row; temperature 0 counts as 1. float32, or float64 for float64
    logits."""
    scaled_NV = _scaled(logits_NV[:, None], temperature_N, -1)[:, 0]
    return scaled_NV.log_softmax(-1).gather(1, token_N[:, None])[:, 0]
