"""Drafting and verifying rows through the kernels, which read the logits and copy none: Triton's on an accelerator, numba's on a
CPU. Cut-offs make the logits outside the support -inf first, in place.

Invariants:
- The tokens are those of `sampler` on the same logits: the same draws, from the same distributions.
- Rows take this path by their own parameters and the device alone (`serves`), never by what stands beside them.

Legend: S = sequences, M = most drafts of one of them, R = M + 1 verify rows, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ...kernels.cutoffs import Edges, cut_, edges
from ...kernels.dispatch import takes_numba, takes_triton
from ...kernels.philox import Purpose
from ...kernels.verify import draft_chain, sample_cdf, sample_gumbel, verify_matching, verify_rejection
from .drafts import Drafts, Group, SamplerRows, Verdict
from .processing import widen


def serves(group: Group, logits: torch.Tensor) -> bool:
    """Whether rows of this group take the kernels. Adjusted logits, and the mixture where it is greedy or cut, are rare: these
    take torch. So do cut-offs on a CPU."""
    if group.adjustment is not None or (group.sampler == "mixed" and (group.greedy or group.cut)):
        return False
    return (not group.cut and takes_numba(logits)) or (logits.dtype != torch.float64 and takes_triton(logits))


def draft(
    rows: SamplerRows,
    q_logits_SMV: torch.Tensor,
    anchor_S: torch.Tensor,
    mask_token: int,
    count_S: torch.Tensor,
    markov: Callable[[torch.Tensor], torch.Tensor] | None,
    previous_S: torch.Tensor | None,
    p_first_SRV: torch.Tensor | None,
) -> Drafts:
    """As `sampler.draft` for one group; for `mixed` without p_first_SRV. The drafts keep `q_logits_SMV` itself, its mask token
    now at -inf."""
    (group,) = rows.groups
    noisy = group.greedy or group.sampler == "coupled"
    if markov is None:
        if p_first_SRV is not None:
            torch.mul(p_first_SRV[:, 0], rows.draft_temperature, out=q_logits_SMV.select(1, 0))
        q_logits_SMV = q_logits_SMV.contiguous()
        q_logits_SMV[..., mask_token] = -torch.inf
        if group.cut:
            _cut(rows, q_logits_SMV, rows.draft_temperature_S)
        sample = sample_gumbel if noisy else sample_cdf
        token_SM, _, lse_SM = sample(q_logits_SMV, rows.draft_temperature_S, rows.seed_S, anchor_S + 1)
        slot_M = torch.arange(token_SM.shape[1], device=token_SM.device)
        token_SM = torch.where(slot_M < count_S[:, None], token_SM, -1)
    else:
        assert previous_S is not None
        if q_logits_SMV.dtype != torch.float32 or not q_logits_SMV.is_contiguous():
            q_logits_SMV = widen(q_logits_SMV).contiguous()
        token_SM, lse_SM = draft_chain(
            q_logits_SMV, markov, previous_S, count_S, rows.draft_temperature_S, rows.seed_S, anchor_S, mask_token,
            Purpose.NOISE if noisy else Purpose.DRAFT, p_first_SRV, rows.draft_temperature,
            partial(_cut, rows, temperature_S=rows.draft_temperature_S) if group.cut else None,
        )  # fmt: skip
    if noisy:
        return Drafts(token_SM, count_S)
    return Drafts(token_SM, count_S, q_logits_SMV=q_logits_SMV, q_lse_SM=lse_SM)


def verify(rows: SamplerRows, p_logits_SRV: torch.Tensor, drafts: Drafts, anchor_S: torch.Tensor) -> Verdict:
    """As `sampler.verify` for one group, whose drafts `draft` drew."""
    (group,) = rows.groups
    r = drafts.token_SM.shape[1] + 1
    found = _cut(rows, p_logits_SRV, rows.temperature_S) if group.cut else None
    if group.greedy or group.sampler in ("ar", "coupled"):
        accepted_S, token_SR, logprob_SR, behavior_SR = verify_matching(
            p_logits_SRV, drafts.token_SM, drafts.count_S, rows.temperature_S, rows.seed_S, anchor_S
        )
    else:
        q_logits_SMV, q_lse_SM = drafts.q_logits_SMV, drafts.q_lse_SM
        if r == 1 or q_logits_SMV is None or q_lse_SM is None:
            assert r == 1, "drafts of these rows were not drawn by the kernels"
            q_logits_SMV, q_lse_SM = p_logits_SRV[:, :0], p_logits_SRV.new_zeros(len(anchor_S), 0, dtype=torch.float64)
        accepted_S, token_SR, logprob_SR, behavior_SR = verify_rejection(
            p_logits_SRV, q_logits_SMV, q_lse_SM, drafts.token_SM, drafts.count_S, rows.temperature_S, rows.seed_S, anchor_S,
            mix_weight_S=rows.mix_weight_S if group.sampler == "mixed" else None,
            draft_temperature_S=rows.draft_temperature_S,
        )  # fmt: skip
    nothing_SR = torch.zeros_like(logprob_SR)
    if found is not None:  # the kernels have seen the support alone
        support_SR = torch.where(token_SR >= 0, found.logmass_SR, nothing_SR)
        return Verdict(accepted_S, token_SR, behavior_SR + support_SR, behavior_SR, support_SR)
    # At temperature 0 the support is the one token.
    behavior_SR, support_SR = (nothing_SR, logprob_SR) if group.greedy else (behavior_SR, nothing_SR)
    return Verdict(accepted_S, token_SR, logprob_SR, behavior_SR, support_SR)


def _cut(rows: SamplerRows, logits_SRV: torch.Tensor, temperature_S: torch.Tensor) -> Edges:
    """Apply the cut-offs in place."""
    found = edges(logits_SRV, temperature_S, rows.top_k_S, rows.top_p_S, rows.min_p_S)
    cut_(logits_SRV, temperature_S, found)
    return found
