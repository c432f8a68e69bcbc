"""Acceptance of drafts, and the draw of the token after them.

Rejection (p: target, q: what the draft d was drawn from, u: uniform numbers):

    accept d  iff  u q(d) < p(d)                                 that is, with probability min(1, p(d) / q(d))
    first rejected row:  x ~ max(p - q, 0) / sum max(p - q, 0)   no mass there: x ~ p
    all accepted:        x ~ p of the row after the last draft

so that each committed token is distributed as p. Source: speculative sampling, arXiv 2211.17192 and 2302.01318.

Matching (x_k: the token the target gives at row k without any draft):

    accept d_k  iff  d_k = x_k;   the first x_k that differs is committed in its place

so that the committed tokens are those of decoding without drafts. With x = argmax(log p + g), g Gumbel noise, x ~ p.

`reference` is the version in torch. `triton` and `rejection` run on an accelerator, over `chunks`; `numba` runs on a CPU, over
`rows`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch

from ..dispatch import dispatched, takes_numba, takes_triton
from ..philox import Purpose
from . import reference
from .reference import (
    PairTable,
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
    "PairTable",
    "Rejection",
    "Sampled",
    "count_accepted",
    "count_matching",
    "draft_chain",
    "draw",
    "gumbel_argmax",
    "logprobs",
    "mix_logits",
    "reject",
    "residual_weights",
    "sample_cdf",
    "sample_gumbel",
    "verify_matching",
    "verify_rejection",
]


sample_gumbel = dispatched(reference.sample_gumbel, numba="numba", wide=False)
sample_cdf = dispatched(reference.sample_cdf, numba="numba", wide=False)
_verify_rejection = dispatched(reference.verify_rejection, triton="rejection", wide=False)


@cache
def _compiled() -> ModuleType:
    """`numba`, imported at first use. A statement that imports it takes as long as a small kernel every time."""
    from . import numba

    return numba


def draft_chain(
    q_logits_SMV: torch.Tensor, markov: Callable[[torch.Tensor], torch.Tensor], previous_S: torch.Tensor,
    count_S: torch.Tensor, temperature_S: torch.Tensor, seed_S: torch.Tensor, anchor_S: torch.Tensor, excluded: int,
    purpose: int, first_SRV: torch.Tensor | None = None, first_scale: float = 1.0,
    cut: Callable[[torch.Tensor], object] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Drafts of which each is drawn given the one before it: token_SM (-1 past the count) and lse_SM, as in `Sampled`.

    Args:
        q_logits_SMV: float32, contiguous; becomes what was drawn from: `markov` of the token before is added to each row, and
            the excluded token's logit is -inf. Rows past the count may hold anything, before and after.
        markov: int64[S] tokens -> float32[S, V].
        previous_S: int64, the token before the first draft.
        anchor_S: int64, its position.
        purpose: NOISE for `sample_gumbel`, DRAFT for `sample_cdf`.
        first_SRV: its first row's logits are put in the place of the first row's, times `first_scale`. Nothing is added to them.
        cut: makes what is not drawn of a slot's logits float32[S, 1, V] -inf.
    """
    if isinstance(markov, PairTable) and takes_numba(q_logits_SMV) and cut is None:
        keys = previous_S, count_S, temperature_S, seed_S, anchor_S
        made: tuple[torch.Tensor, torch.Tensor]
        made = _compiled().draft_chain(q_logits_SMV, markov.pair_VV, *keys, excluded, purpose, first_SRV, first_scale)
        return made
    sample = sample_gumbel if purpose == Purpose.NOISE else sample_cdf
    if first_SRV is not None:
        torch.mul(first_SRV[:, 0], first_scale, out=q_logits_SMV[:, 0])
    chosen, position_S = [], anchor_S + 1
    for k in range(q_logits_SMV.shape[1]):
        if k > 0 or first_SRV is None:
            q_logits_SMV[:, k] += markov(previous_S)
        q_logits_SMV[:, k, excluded] = -torch.inf
        if cut is not None:
            cut(q_logits_SMV[:, k : k + 1])
        chosen.append(sample(q_logits_SMV[:, k : k + 1], temperature_S, seed_S, position_S + k))
        previous_S = chosen[-1].token_SR[:, 0]
    token_SM, lse_SM = torch.cat([slot.token_SR for slot in chosen], 1), torch.cat([slot.lse_SR for slot in chosen], 1)
    slot_M = torch.arange(token_SM.shape[1], device=token_SM.device)
    return torch.where(slot_M < count_S[:, None], token_SM, -1), lse_SM


def verify_matching(
    p_logits_SRV: torch.Tensor, draft_SM: torch.Tensor, count_S: torch.Tensor, temperature_S: torch.Tensor,
    seed_S: torch.Tensor, anchor_S: torch.Tensor,
) -> Rejection:  # fmt: skip
    """Accept drafts while they are the tokens of `sample_gumbel`, for `ar`, `coupled` and temperature 0.

    Args: as of `reference.verify_rejection`.
    """
    if takes_numba(p_logits_SRV):
        found: Rejection = _compiled().verify_matching(p_logits_SRV, draft_SM, count_S, temperature_S, seed_S, anchor_S)
        return found
    token_SR, logprob_SR, _ = sample_gumbel(p_logits_SRV, temperature_S, seed_S, anchor_S + 1)
    accepted_S = count_matching(token_SR[:, :-1], draft_SM, count_S)
    committed_SR = torch.arange(token_SR.shape[1], device=token_SR.device) <= accepted_S[:, None]
    logprob_SR = torch.where(committed_SR, logprob_SR, 0.0)
    return Rejection(accepted_S, torch.where(committed_SR, token_SR, -1), logprob_SR, logprob_SR)


def verify_rejection(
    p_logits_SRV: torch.Tensor, q_logits_SMV: torch.Tensor, q_lse_SM: torch.Tensor, draft_SM: torch.Tensor,
    count_S: torch.Tensor, temperature_S: torch.Tensor, seed_S: torch.Tensor, anchor_S: torch.Tensor, excluded: int = -1,
    mix_weight_S: torch.Tensor | None = None, draft_temperature_S: torch.Tensor | None = None,
) -> Rejection:  # fmt: skip
    """`reference.verify_rejection`."""
    keys = draft_SM, count_S, temperature_S, seed_S, anchor_S, excluded, mix_weight_S, draft_temperature_S
    if takes_numba(p_logits_SRV):
        found: Rejection = _compiled().verify_rejection(p_logits_SRV, q_logits_SMV, q_lse_SM, *keys)
        return found
    return _verify_rejection(p_logits_SRV, q_logits_SMV, q_lse_SM, *keys)


def logprobs(logits_NV: torch.Tensor, token_N: torch.Tensor, temperature_N: torch.Tensor) -> torch.Tensor:
    """Log-probability of one token per row at the temperature (0: at 1), nothing cut; see `reference.logprobs`. On a CPU they
    are to the last bit those that verification gives for the same logits."""
    if takes_numba(logits_NV):
        found: torch.Tensor = _compiled().logprobs(logits_NV, token_N, temperature_N)
        return found
    return reference.logprobs(logits_NV, token_N, temperature_N)
