"""The training objective.

    L = (alpha * L_AR + L_draft) / (1 + alpha)
    L_AR = mean over clean rows of  CE(target),  or of  KL(p_parent || p)  where a parent is given
    L_draft = sum over mask rows of  w * (ce * CE + tv * TV(p, q) + kl * KL(p || q)) / sum of w,  plus sampled * L_sampled
    Means and sums of w are over all packs of a step.
    w = slot_decay ** slot * (chance that the slot is reached)

p at a mask row's position is the AR distribution of the clean row before it, without gradient. Sources: TiDAR
(arXiv 2511.08923) for the doubled pack; arXiv 2607.05722 and 2607.05147 for drawing q to the model's own p, where decoding
looks at it.

Decoding compares q of slot i with p after drafts 1..i-1 that were all accepted. Such a prefix y has the chance
prod min(p(y), q(y)). Documents are drawn from p (if they are what the policy writes), so a document counts with
prod min(1, q / p) at its own tokens (`slots: accepted`; `slots: reached` takes the mean over tokens, the overlap, instead);
drafts are drawn from q, so a drafted prefix counts with prod min(1, p / q) (`sampled`). None of these weights has a gradient.

Legend: T rows, M mask rows with loss, C blocks, B slots of the longest block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..layout import CLEAN, TokenLayout, causal
from ..policy import Policy, Routing
from .compare import Heads, LossRows, Terms, compare
from .config import DraftLoss
from .sampled import sampled_drafts


@dataclass(frozen=True)
class Weights:
    """What the losses of a pack, or of all packs of a step, are divided by.

    Attributes:
        ar: clean rows with loss. draft: sum of w over the mask rows. sampled: the same over the drafted rows.
    """

    ar: float
    draft: float = 0.0
    sampled: float = 0.0


@dataclass(frozen=True)
class Losses:
    """The loss to differentiate and what it is made of (detached): cross-entropies in nats per token, and overlap, the
    mean of sum_v min(p, q): the chance that a draft is accepted at temperature 1."""

    total: torch.Tensor
    ar: float
    draft: float
    overlap: float


@dataclass(frozen=True)
class PackLosses:
    """Losses of one pack, as sums over its rows, so that those of several packs add up.

    Attributes:
        ar, draft, sampled: sums of weight times loss, with gradient.
        weights: what they are means over, of this pack.
        cross_entropy, nll, overlap: `ar`, `draft` and `overlap` of `Losses`.
    """

    ar: torch.Tensor
    draft: torch.Tensor | None
    sampled: torch.Tensor | None
    weights: Weights
    cross_entropy: float
    nll: float
    overlap: float

    def share(self, alpha: float, draft: DraftLoss, over: Weights) -> torch.Tensor:
        """The pack's share of L of a step whose packs have the weights `over` in all; L itself where they are its own. The
        shares of all packs add up to the step's loss and gradient, whatever packs its documents are in."""
        ar = self.ar / over.ar
        if not over.draft:
            return ar
        drafted = ar.new_zeros(()) if self.draft is None else self.draft / over.draft
        if self.sampled is not None and over.sampled:
            drafted = drafted + draft.sampled * self.sampled / over.sampled
        return (alpha * ar + drafted) / (1 + alpha)


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
    """L of one pack that is a step of its own; arguments as in `pack_losses`."""
    losses = pack_losses(policy, layout, target_T, prompts, draft, routing, parent)
    return Losses(losses.share(alpha, draft, losses.weights), losses.cross_entropy, losses.nll, losses.overlap)


def pack_losses(
    policy: Policy,
    layout: TokenLayout,
    target_T: torch.Tensor,
    prompts: Sequence[int],
    draft: DraftLoss,
    routing: Routing | None = None,
    parent: Policy | None = None,
) -> PackLosses:
    """Losses of one pack.

    Args:
        target_T: as `layout.diffusion` or a shifted causal pack gives it; -100 where there is no target.
        prompts: prompt length of each sequence; its tokens carry no loss.
        parent: the policy whose p the clean rows are to keep; None learns the targets.
    """
    hidden_TD = policy(layout, routing=routing)
    rows = LossRows.of(layout, target_T, prompts)
    parent_RD = None if parent is None else _parent_states(parent, layout, rows)
    heads = Heads(policy, parent, distil=draft.tv > 0 or draft.kl > 0)
    terms = _terms(heads, hidden_TD, rows, parent_RD)
    ar = terms.nll_R.sum() if parent is None else terms.kept_R.sum()
    count, cross_entropy = len(rows.clean_R), terms.nll_R.mean().item()
    if not len(rows.mask_M):
        return PackLosses(ar, None, None, Weights(count), cross_entropy, 0.0, 0.0)
    drafted = _drafted(policy, hidden_TD, layout, rows, terms, draft)
    weights = Weights(count, drafted.weight, drafted.sampled_weight)
    return PackLosses(ar, drafted.loss, drafted.sampled, weights, cross_entropy, drafted.nll, drafted.overlap)


@dataclass(frozen=True)
class DraftLosses:
    """L_draft of a pack, as sums over its mask rows, so that those of several packs add up.

    Attributes:
        loss, sampled: sums of weight times loss, with gradient; `sampled` is None where it does not count.
        weight, sampled_weight: what they are means over, of this pack.
        nll: mean cross-entropy of the draft, nats. overlap: mean overlap of p and q.
    """

    loss: torch.Tensor
    weight: float
    sampled: torch.Tensor | None
    sampled_weight: float
    nll: float
    overlap: float

    def share(self, draft: DraftLoss, weight: float, sampled_weight: float) -> torch.Tensor:
        """The pack's share of L_draft of a step whose packs have these weights in all."""
        loss = self.loss / weight
        return loss if self.sampled is None else loss + draft.sampled * self.sampled / sampled_weight


def draft_losses(
    policy: Policy,
    hidden_TD: torch.Tensor,
    layout: TokenLayout,
    target_T: torch.Tensor,
    prompts: Sequence[int],
    draft: DraftLoss,
    temperature: float = 1.0,
) -> DraftLosses | None:
    """L_draft of a pack whose hidden states are known, with p and q at `temperature`; None without mask rows. For trainers with
    a loss of their own on the clean rows."""
    rows = LossRows.of(layout, target_T, prompts)
    if not len(rows.mask_M):
        return None
    heads = Heads(policy, temperature=temperature, distil=draft.tv > 0 or draft.kl > 0)
    terms = _terms(heads, hidden_TD, rows, None, own_loss=False)
    return _drafted(policy, hidden_TD, layout, rows, terms, draft, temperature)


def _terms(
    heads: Heads, hidden_TD: torch.Tensor, rows: LossRows, parent_RD: torch.Tensor | None, own_loss: bool = True
) -> Terms:
    clean_RD = hidden_TD[rows.clean_R]
    return compare(
        heads, clean_RD if own_loss else clean_RD.detach(), rows.target_R, hidden_TD[rows.mask_M], rows.teacher_M,
        rows.previous_M, rows.target_M, parent_RD,
    )  # fmt: skip


def _drafted(
    policy: Policy,
    hidden_TD: torch.Tensor,
    layout: TokenLayout,
    rows: LossRows,
    terms: Terms,
    draft: DraftLoss,
    temperature: float = 1.0,
) -> DraftLosses:
    # A term that does not count would still cost its backward pass.
    weighed = ((draft.ce, terms.nll_M), (draft.tv, terms.tv_M), (draft.kl, terms.kl_M))
    loss_M = sum((weight * term_M for weight, term_M in weighed if weight), torch.zeros_like(terms.nll_M))
    overlap_M = 1 - terms.tv_M.detach()
    weight_M = draft.slot_decay ** rows.slot_M.float()
    if draft.slots == "reached":
        weight_M = weight_M * chance_reached(overlap_M, rows.block_M, rows.slot_M)
    elif draft.slots == "accepted":
        accepted_M = (-terms.nll_M.detach() - terms.logp_M).clamp_max(0).exp()
        weight_M = weight_M * chance_reached(accepted_M, rows.block_M, rows.slot_M)
    loss, weight = (loss_M * weight_M).sum(), weight_M.sum().item()
    extra, extra_weight = None, 0.0
    if draft.sampled:
        sampled = sampled_drafts(policy, hidden_TD, layout, rows, temperature)
        weight_M = draft.slot_decay ** sampled.slot_M.float()
        weight_M = weight_M * chance_reached(sampled.accepted_M, sampled.block_M, sampled.slot_M)
        # Its target is p, so cross-entropy is KL up to a constant.
        loss_M = draft.tv * sampled.terms.tv_M + (draft.ce + draft.kl) * sampled.terms.kl_M
        extra, extra_weight = (loss_M * weight_M).sum(), weight_M.sum().item()
    return DraftLosses(loss, weight, extra, extra_weight, terms.nll_M.mean().item(), overlap_M.mean().item())


def chance_reached(accepted_M: torch.Tensor, block_M: torch.Tensor, slot_M: torch.Tensor) -> torch.Tensor:
    """Product, over the slots before each row in its block, of the chance that a draft there is accepted."""
    blocks, number_M = block_M.unique(return_inverse=True)
    chance_CB = accepted_M.new_ones(len(blocks), int(slot_M.max()) + 2)
    chance_CB[number_M, slot_M + 1] = accepted_M
    return chance_CB.cumprod(1)[number_M, slot_M]


def _parent_states(parent: Policy, layout: TokenLayout, rows: LossRows) -> torch.Tensor:
    """The parent's hidden states of the clean rows with loss."""
    clean_T = layout.block_T == CLEAN
    texts = [layout.token_T[clean_T & (layout.sequence_T == s)].tolist() for s in range(layout.sequences)]
    with torch.no_grad():
        hidden_TD = parent(causal(texts).to(layout.token_T.device))
    return hidden_TD[clean_T.cumsum(0)[rows.clean_R] - 1]
