"""The GRPO loss over trajectories as the service records them.

    rho_t = exp(log p_new(t) - log p_old(t))                                  p_old: the recorded `logprobs`
    w_t   = min(exp(log p_old(t) - log behaviour(t)), cap)                    1 for samplers that draw from p
    k_t   = r_t - 1 - log r_t,  r_t = p_start(t) / p_new(t)                   an estimate of KL(p_new || p_start)
    L     = sum_t s_t (kl_weight * k_t - w_t min(rho_t A, clip(rho_t) A))
            + draft_weight * L_draft
    s_t   = 1 / tokens of the update              `aggregation: token`
            1 / (samples of the update * tokens of the sample)     `aggregation: sequence`

p_old is that of the weight version that made the token, so the ratio is right for samples that several versions made.

Legend: T rows, N generated tokens of the pack, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ....model.conversion.objective import DraftLosses, draft_losses
from ....model.layout import CLEAN, diffusion
from ....model.policy import Policy
from .config import Loss
from .rewards import LearningSample

Blocks = list[tuple[int, int]]
"""(start, length) of the mask blocks of one sample."""


@dataclass(frozen=True)
class Update:
    """Samples and tokens of one optimiser step, and the weights by which the draft losses of its packs are divided
    (`DraftLosses`)."""

    samples: int
    tokens: int
    draft: float = 0.0
    sampled: float = 0.0


@dataclass(frozen=True)
class Figures:
    """Figures of one pack: its N tokens; sums over them (clipped: 1 where the clip bounds; kl: log p_old - log p_new;
    ratio: rho); the mean overlap of p and q over its mask rows, and the samples that have some."""

    tokens: int
    clipped: float
    kl: float
    ratio: float
    overlap: float
    drafted: int


def mask_blocks(start: int, end: int, size: int, draw: random.Random) -> Blocks:
    """(start, length) of mask blocks over an answer at the positions `start` to `end`; the second one begins at a random distance
    from the first, so that every alignment is trained."""
    first = start + draw.randint(1, size)
    return [(s, size) for s in (start, *range(first, end, size))]


def draft_weight(samples: Sequence[LearningSample], blocks: Sequence[Blocks], slot_decay: float) -> float:
    """Sum of slot_decay ** slot over the mask rows of answers, where every slot counts (`slots: all`)."""
    ends = [sample.rows for sample in samples]
    return sum(slot_decay**slot for end, some in zip(ends, blocks, strict=True)
               for start, length in some for slot in range(min(length, end - start)))  # fmt: skip


@torch.no_grad()
def computed_draft_weights(
    policy: Policy, packs: Sequence[tuple[Sequence[LearningSample], Sequence[Blocks]]], temperature: float, loss: Loss
) -> tuple[float, float]:
    """The weights of `Update`, where they depend on p and q: one forward pass over the packs that have mask rows."""
    found = [drafted for pack, blocks in packs if any(blocks)
             for drafted in [_Pack(policy, pack, blocks).drafted(temperature, loss)] if drafted is not None]  # fmt: skip
    return sum(d.weight for d in found), sum(d.sampled_weight for d in found)


def pack_loss(
    policy: Policy,
    pack: Sequence[LearningSample],
    blocks: Sequence[Blocks],
    update: Update,
    temperature: float,
    loss: Loss,
) -> tuple[torch.Tensor, Figures]:
    """The pack's part of the update's loss.

    Args:
        blocks: the mask blocks of each sample; none for one that trains no draft.
    """
    trajectories, run = [sample.trajectory for sample in pack], _Pack(policy, pack, blocks)
    new_N = run.logprobs(temperature)
    old_N = torch.from_numpy(np.concatenate([t.logprobs for t in trajectories]))
    behavior_N = torch.from_numpy(np.concatenate([t.behavior_logprobs for t in trajectories]))
    counts = torch.tensor([len(t.tokens) for t in trajectories])
    advantage_N = torch.tensor([sample.advantage for sample in pack], dtype=torch.float32).repeat_interleave(counts)
    scale_N = torch.full_like(new_N, 1 / update.tokens)
    if loss.aggregation == "sequence":
        scale_N = (1 / (update.samples * counts.float())).repeat_interleave(counts)
    ratio_N = (new_N - old_N).exp()
    weight_N = (old_N - behavior_N).exp().clamp_max(loss.importance_cap)
    bounded_N = ratio_N.clamp(1 - loss.clip_low, 1 + loss.clip_high)
    gain_N = weight_N * torch.minimum(ratio_N * advantage_N, bounded_N * advantage_N)
    value = -(scale_N * gain_N).sum()
    if loss.kl_weight:
        log_r_N = torch.from_numpy(np.concatenate([sample.reference for sample in pack])) - new_N
        value = value + loss.kl_weight * (scale_N * (log_r_N.exp() - 1 - log_r_N)).sum()
    drafted = run.drafted(temperature, loss) if any(blocks) else None
    if drafted is not None:
        value = value + loss.draft_weight * drafted.share(loss.draft, update.draft, update.sampled)
    clipped = (ratio_N * advantage_N > bounded_N * advantage_N).float().sum().item()
    kl, ratio = (old_N - new_N).detach().sum().item(), ratio_N.detach().sum().item()
    overlap, drafting = (0.0, 0) if drafted is None else (drafted.overlap, sum(map(bool, blocks)))
    return value, Figures(len(new_N), clipped, kl, ratio, overlap, drafting)


class _Pack:
    """The forward pass over a pack of samples, with its mask blocks."""

    def __init__(self, policy: Policy, pack: Sequence[LearningSample], blocks: Sequence[Blocks]) -> None:
        trajectories = [sample.trajectory for sample in pack]
        self._policy, self._prompts = policy, [len(t.prompt_tokens) for t in trajectories]
        texts = [[*t.prompt_tokens, *t.tokens] for t in trajectories]
        self._layout, self._target_T = diffusion(texts, blocks, policy.mask_token_id)
        self._hidden_TD = policy(self._layout)

    def logprobs(self, temperature: float) -> torch.Tensor:
        """log p of the generated tokens, [N]."""
        layout, target_T = self._layout, self._target_T
        prompt_T = torch.tensor(self._prompts)[layout.sequence_T]
        rows = torch.nonzero((layout.block_T == CLEAN) & (target_T >= 0) & (layout.position_T >= prompt_T - 1))[:, 0]
        logits_NV = self._policy.head(self._hidden_TD[rows]).float()
        return (logits_NV / temperature).log_softmax(-1).gather(1, target_T[rows, None])[:, 0]

    def drafted(self, temperature: float, loss: Loss) -> DraftLosses | None:
        """Losses of the mask rows."""
        return draft_losses(self._policy, self._hidden_TD, self._layout, self._target_T, self._prompts, loss.draft, temperature)
