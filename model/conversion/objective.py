"""The training objective over one pack.

    L = (alpha * L_AR + L_draft) / (1 + alpha)
    L_AR = mean over clean rows of  CE(target),  or of  KL(p_parent || p)  where a parent is given
    L_draft = mean over mask rows of  w_slot * (ce * CE + tv * TV(p, q) + kl * KL(p || q))

p at a mask row's position is the AR distribution of the clean row before it, without gradient. Sources: TiDAR
(arXiv 2511.08923) for the doubled pack; arXiv 2607.05722 and 2607.05147 for drawing q to the model's own p.

Legend: T rows, M mask rows with a target, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..layout import CLEAN, TokenLayout, causal
from ..policy import Policy, Routing
from .config import DraftLoss


@dataclass(frozen=True)
class Losses:
    """The loss to differentiate and what it is made of (detached): cross-entropies in nats per token, and overlap, the
    mean of sum_v min(p, q): the chance that a draft is accepted at temperature 1."""

    total: torch.Tensor
    ar: float
    draft: float
    overlap: float


def objective(
    policy: Policy,
    layout: TokenLayout,
    target_T: torch.Tensor,
    prompts: Sequence[int],
    alpha: float,
    draft: DraftLoss,
    routing: Routing | None = None,
    parent: Policy | None = None,
) -> Losses:
    """Losses of one pack.

    Args:
        target_T: as `layout.diffusion` or a shifted causal pack gives it; -100 where there is no target.
        prompts: prompt length of each sequence; its tokens carry no loss.
        parent: the policy whose p the clean rows are to keep; None learns the targets.
    """
    hidden_TD = policy(layout, routing=routing)
    prompt_T = torch.tensor(prompts)[layout.sequence_T]
    clean_T = layout.block_T == CLEAN
    ar_rows = torch.nonzero(clean_T & (target_T >= 0) & (layout.position_T >= prompt_T - 1))[:, 0]
    logits_RV = policy.head(hidden_TD[ar_rows]).float()
    ce = F.cross_entropy(logits_RV, target_T[ar_rows])
    ar = ce if parent is None else kept(parent, layout, clean_T, ar_rows, logits_RV)
    mask_rows = torch.nonzero(~clean_T & (target_T >= 0))[:, 0]
    if not len(mask_rows):
        return Losses(ar, ce.item(), 0.0, 0.0)
    drafted, draft_ce, overlap = draft_loss(policy, hidden_TD, layout, target_T, ar_rows, logits_RV, mask_rows, draft)
    return Losses((alpha * ar + drafted) / (1 + alpha), ce.item(), draft_ce, overlap)


def kept(
    parent: Policy, layout: TokenLayout, clean_T: torch.Tensor, ar_rows: torch.Tensor, logits_RV: torch.Tensor
) -> torch.Tensor:
    """Mean KL(p_parent || p) of the clean rows `ar_rows`, whose logits under the policy are `logits_RV`."""
    texts = [layout.token_T[clean_T & (layout.sequence_T == s)].tolist() for s in range(layout.sequences)]
    among_clean = clean_T.cumsum(0)[ar_rows] - 1
    with torch.no_grad():
        hidden_TD = parent(causal(texts).to(layout.token_T.device))
        logp_RV = parent.head(hidden_TD[among_clean]).float().log_softmax(-1)
    return F.kl_div(logits_RV.log_softmax(-1), logp_RV, reduction="batchmean", log_target=True)


def draft_loss(
    policy: Policy,
    hidden_TD: torch.Tensor,
    layout: TokenLayout,
    target_T: torch.Tensor,
    ar_rows: torch.Tensor,
    logits_RV: torch.Tensor,
    mask_rows: torch.Tensor,
    draft: DraftLoss,
) -> tuple[torch.Tensor, float, float]:
    """L_draft of the mask rows, their mean cross-entropy (nats) and their mean overlap with p.

    Args:
        ar_rows: clean rows whose logits `logits_RV` are; every mask row's predecessor position is among them.
        mask_rows: rows to train, each with a target.
    """
    logq_MV = policy.head(hidden_TD[mask_rows]).float().log_softmax(-1)
    ce_M = F.nll_loss(logq_MV, target_T[mask_rows], reduction="none")
    # The clean row that predicts the same position as mask row i is the one at position_i - 1 of its sequence.
    place = torch.full((layout.sequences, int(layout.position_T.max()) + 1), -1)
    place[layout.sequence_T[ar_rows], layout.position_T[ar_rows]] = torch.arange(len(ar_rows))
    teacher = place[layout.sequence_T[mask_rows], layout.position_T[mask_rows] - 1]
    p_MV = logits_RV.detach().softmax(-1)[teacher]
    q_MV = logq_MV.exp()
    tv_M = 0.5 * (p_MV - q_MV).abs().sum(-1)
    loss_M = draft.ce * ce_M + draft.tv * tv_M
    if draft.kl:
        loss_M = loss_M + draft.kl * (torch.xlogy(p_MV, p_MV) - p_MV * logq_MV).sum(-1)
    weight_M = draft.slot_decay ** (layout.position_T - layout.limit_T - 1)[mask_rows].float()
    return (loss_M * weight_M).sum() / weight_M.sum(), ce_M.mean().item(), 1.0 - tv_M.mean().item()
