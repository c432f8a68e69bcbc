"""Drafting and verifying rows without cut-offs through the kernels, which read the logits and copy none.

Invariants:
- The tokens are those of `sampler` on the same logits: the same draws, from the same distributions.
- Rows take this path by their own parameters and the device alone (`serves`), never by what stands beside them.

Legend: S = sequences, M = most drafts of one of them, R = M + 1 verify rows, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...kernels.dispatch import takes_triton
from ...kernels.verify import count_matching, sample_cdf, sample_gumbel, verify_rejection
from .drafts import Drafts, Group, SamplerRows, Verdict
from .processing import widen


def serves(group: Group, logits: torch.Tensor) -> bool:
    """Whether rows of this group take the kernels. Cut-offs rank the vocabulary, and the greedy mixture is rare: torch."""
    plain = not group.cut and not (group.greedy and group.sampler == "mixed")
    return plain and logits.dtype != torch.float64 and takes_triton(logits)


def draft(
    rows: SamplerRows,
    q_logits_SMV: torch.Tensor,
    anchor_S: torch.Tensor,
    mask_token: int,
    count_S: torch.Tensor,
    markov: Callable[[torch.Tensor], torch.Tensor] | None,
    previous_S: torch.Tensor | None,
) -> Drafts:
    """As `sampler.draft` for one group. The drafts keep `q_logits_SMV` itself, its mask token now at -inf."""
    (group,) = rows.groups
    m = q_logits_SMV.shape[1]
    sample = sample_gumbel if group.greedy or group.sampler == "coupled" else sample_cdf
    if markov is not None:
        q_logits_SMV = widen(q_logits_SMV).clone()
    q_logits_SMV[..., mask_token] = -torch.inf
    if markov is None:
        token_SM, _, lse_SM = sample(q_logits_SMV, rows.temperature_S, rows.seed_S, anchor_S + 1)
    else:
        assert previous_S is not None
        chosen = []
        for k in range(m):
            q_logits_SMV[:, k] += markov(previous_S)
            slot = sample(q_logits_SMV[:, k : k + 1], rows.temperature_S, rows.seed_S, anchor_S + 1 + k)
            chosen.append(slot)
            previous_S = slot.token_SR[:, 0]
        token_SM, lse_SM = (torch.cat(part, 1) for part in ([c.token_SR for c in chosen], [c.lse_SR for c in chosen]))
    slot_M = torch.arange(m, device=q_logits_SMV.device)
    token_SM = torch.where(slot_M < count_S[:, None], token_SM, -1)
    if sample is sample_gumbel:
        return Drafts(token_SM, count_S)
    return Drafts(token_SM, count_S, q_logits_SMV=q_logits_SMV, q_lse_SM=lse_SM)


def verify(rows: SamplerRows, p_logits_SRV: torch.Tensor, drafts: Drafts, anchor_S: torch.Tensor) -> Verdict:
    """As `sampler.verify` for one group, whose drafts `draft` drew."""
    (group,) = rows.groups
    r = p_logits_SRV.shape[1]
    row_R = torch.arange(r, device=p_logits_SRV.device)
    if group.greedy or group.sampler in ("ar", "coupled"):
        token_SR, logprob_SR, _ = sample_gumbel(p_logits_SRV, rows.temperature_S, rows.seed_S, anchor_S + 1)
        accepted_S = count_matching(token_SR[:, : r - 1], drafts.token_SM, drafts.count_S)
        committed_SR = row_R <= accepted_S[:, None]
        token_SR = torch.where(committed_SR, token_SR, -1)
        logprob_SR = behavior_SR = torch.where(committed_SR, logprob_SR, 0.0)
    else:
        q_logits_SMV, q_lse_SM = drafts.q_logits_SMV, drafts.q_lse_SM
        if r == 1 or q_logits_SMV is None or q_lse_SM is None:
            assert r == 1, "drafts of these rows were not drawn by the kernels"
            q_logits_SMV, q_lse_SM = p_logits_SRV[:, :0], p_logits_SRV.new_zeros(len(anchor_S), 0, dtype=torch.float64)
        accepted_S, token_SR, logprob_SR, behavior_SR = verify_rejection(
            p_logits_SRV, q_logits_SMV, q_lse_SM, drafts.token_SM, drafts.count_S, rows.temperature_S, rows.seed_S, anchor_S,
            mix_weight_S=rows.mix_weight_S if group.sampler == "mixed" else None,
        )  # fmt: skip
    nothing_SR = torch.zeros_like(logprob_SR)
    # At temperature 0 the support is the one token.
    behavior_SR, support_SR = (nothing_SR, logprob_SR) if group.greedy else (behavior_SR, nothing_SR)
    return Verdict(accepted_S, token_SR, logprob_SR, behavior_SR, support_SR, row_R < accepted_S[:, None])
