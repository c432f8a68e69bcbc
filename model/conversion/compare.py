"""q of mask rows against p of the clean rows that predict the same positions, without the logits of all rows at once.

Invariants:
- p carries no gradient into a comparison with q: q is drawn to p, never p to q.
- The clean rows' logits are computed once and serve both their own loss and every mask row they teach. What exists at once
  is bounded (`vocabulary`); the results do not depend on how many rows that is.

Legend: T rows, R clean rows with loss, M mask rows with loss, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from ..layout import CLEAN, TokenLayout
from ..policy import Policy
from ..vocabulary import recomputed, rows_at_once

_COPIES = 8
"""float32 tensors of a chunk's size in `_compare_chunk` and its backward pass."""


@dataclass(frozen=True)
class LossRows:
    """Which rows of a training pack carry loss.

    Attributes:
        clean_R: clean rows, from the last one of each prompt on. target_R: their next tokens.
        mask_M: mask rows after the prompt and before the document's end. target_M: the tokens at their positions.
        teacher_M: the entry of `clean_R` that predicts the same position as each mask row.
        previous_M: the token before each mask row in its document.
        slot_M: place in the block. block_M: number of the block.
    """

    clean_R: torch.Tensor
    target_R: torch.Tensor
    mask_M: torch.Tensor
    target_M: torch.Tensor
    teacher_M: torch.Tensor
    previous_M: torch.Tensor
    slot_M: torch.Tensor
    block_M: torch.Tensor

    @classmethod
    def of(cls, layout: TokenLayout, target_T: torch.Tensor, prompts: Sequence[int]) -> LossRows:
        """Args: layout and target_T as `layout.diffusion` makes them; prompts, prompt length of each sequence."""
        device = layout.token_T.device
        prompt_T = torch.tensor(prompts, device=device)[layout.sequence_T]
        clean_T, position_T = layout.block_T == CLEAN, layout.position_T
        first_S = torch.searchsorted(layout.sequence_T, torch.arange(layout.sequences, device=device))
        clean_R = torch.nonzero(clean_T & (target_T >= 0) & (position_T >= prompt_T - 1))[:, 0]
        mask_M = torch.nonzero(~clean_T & (target_T >= 0) & (position_T >= prompt_T))[:, 0]
        # A sequence's clean rows come first, in order: the one before a mask row's position is found by counting.
        before_M = first_S[layout.sequence_T[mask_M]] + position_T[mask_M] - 1
        place_T = torch.full_like(target_T, -1)
        place_T[clean_R] = torch.arange(len(clean_R), device=device)
        return cls(
            clean_R=clean_R,
            target_R=target_T[clean_R],
            mask_M=mask_M,
            target_M=target_T[mask_M],
            teacher_M=place_T[before_M],
            previous_M=layout.token_T[before_M],
            slot_M=(position_T - layout.limit_T - 1)[mask_M],
            block_M=layout.block_T[mask_M],
        )


@dataclass(frozen=True)
class Terms:
    """What the rows say, in nats where it is a logarithm. p without gradient, except in `nll_R` and `kept_R`.

    Attributes:
        nll_R: -log p(target). kept_R: KL(p_parent || p); zero without a parent.
        nll_M: -log q(token). logp_M: log p(token).
        tv_M: total variation of p and q. kl_M: KL(p || q).
    """

    nll_R: torch.Tensor
    kept_R: torch.Tensor
    nll_M: torch.Tensor
    logp_M: torch.Tensor
    tv_M: torch.Tensor
    kl_M: torch.Tensor


@dataclass(frozen=True)
class Heads:
    """What turns hidden states into distributions.

    Attributes:
        parent: the policy whose p is to be kept, if any.
        temperature: p and q are taken at it.
        distil: whether a gradient may be asked of `tv_M` and `kl_M`.
    """

    policy: Policy
    parent: Policy | None = None
    temperature: float = 1.0
    distil: bool = True

    def log_probabilities(self, logits_RV: torch.Tensor) -> torch.Tensor:
        """float32, at the temperature."""
        logits_RV = logits_RV.float()
        return (logits_RV if self.temperature == 1.0 else logits_RV / self.temperature).log_softmax(-1)


def compare(
    heads: Heads,
    clean_RD: torch.Tensor,
    target_R: torch.Tensor,
    mask_MD: torch.Tensor,
    teacher_M: torch.Tensor,
    previous_M: torch.Tensor,
    token_M: torch.Tensor,
    parent_RD: torch.Tensor | None = None,
) -> Terms:
    """Terms of clean rows and of the mask rows they teach.

    Args:
        clean_RD, mask_MD: final hidden states; parent_RD: the parent's, of the clean rows.
        teacher_M: the clean row of each mask row. previous_M: the token before it. token_M: the token it is asked for.
    """
    # Mask rows in the order of their teachers, so that a run of clean rows and the rows they teach make a chunk.
    order_M = torch.argsort(teacher_M, stable=True)
    sorted_M = teacher_M[order_M]
    rows, width = len(clean_RD), rows_at_once(heads.policy.config.vocab_size, _COPIES, clean_RD.device)
    # A row counts with those it teaches; a chunk has one row at least.
    weight_R = 1 + torch.bincount(teacher_M, minlength=rows)
    chunk_R = (weight_R.cumsum(0) - 1) // width
    ends = torch.searchsorted(chunk_R, torch.arange(int(chunk_R[-1]) + 1, device=chunk_R.device), right=True)
    ends = ends.unique().tolist()
    cuts = torch.searchsorted(sorted_M, torch.tensor(ends, device=sorted_M.device)).tolist()
    parent_RD = clean_RD if parent_RD is None else parent_RD

    def one(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _compare_chunk(heads, *arguments)

    parts, row, mask = [], 0, 0
    for end, cut in zip(ends, cuts, strict=True):
        some_M = order_M[mask:cut]
        arguments = (clean_RD[row:end], target_R[row:end], parent_RD[row:end], mask_MD[some_M],
                     teacher_M[some_M] - row, previous_M[some_M], token_M[some_M])  # fmt: skip
        parts.append(one(*arguments) if len(ends) == 1 else recomputed(one, *arguments))
        row, mask = end, cut
    back_M = torch.argsort(order_M)
    joined = [torch.cat(part) for part in zip(*parts, strict=True)]
    names = [field.name for field in fields(Terms)]
    return Terms(**{name: x[back_M] if name.endswith("M") else x for name, x in zip(names, joined, strict=True)})


def _compare_chunk(
    heads: Heads,
    clean_RD: torch.Tensor,
    target_R: torch.Tensor,
    parent_RD: torch.Tensor,
    mask_MD: torch.Tensor,
    teacher_M: torch.Tensor,
    previous_M: torch.Tensor,
    token_M: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    logp_RV, logq_MV = _log_probabilities(heads, clean_RD, mask_MD, previous_M)
    nll_R = -logp_RV.gather(1, target_R[:, None])[:, 0]
    kept_R = torch.zeros_like(nll_R)
    if heads.parent is not None:
        with torch.no_grad():
            parent_RV = heads.log_probabilities(heads.parent.head(parent_RD))
        kept_R = (parent_RV.exp() * (parent_RV - logp_RV)).sum(-1)
    if not len(mask_MD):
        nothing_M = nll_R.new_zeros(0)
        return nll_R, kept_R, nothing_M, nothing_M, nothing_M, nothing_M
    nll_M = -logq_MV.gather(1, token_M[:, None])[:, 0]
    with torch.set_grad_enabled(torch.is_grad_enabled() and heads.distil):
        logp_MV = logp_RV.detach()[teacher_M]
        p_MV = logp_MV.exp()
        tv_M = 0.5 * (p_MV - logq_MV.exp()).abs().sum(-1)
        kl_M = (p_MV * (logp_MV - logq_MV)).sum(-1)
    return nll_R, kept_R, nll_M, logp_MV.gather(1, token_M[:, None])[:, 0], tv_M, kl_M


def _log_probabilities(
    heads: Heads, clean_RD: torch.Tensor, mask_MD: torch.Tensor, previous_M: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of clean rows and log q of mask rows; the logits they are made of are gone afterwards."""
    head = heads.policy.head
    if clean_RD.requires_grad:
        # One product: the head's weight is read, and its gradient written, once per chunk.
        p_RV, q_MV = head(torch.cat([clean_RD, mask_MD])).split([len(clean_RD), len(mask_MD)])
    else:
        p_RV, q_MV = head(clean_RD), head(mask_MD)
    return heads.log_probabilities(p_RV), heads.log_probabilities(heads.policy.conditioned(q_MV, previous_M))
