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

from ....model.conversion.objective import draft_loss
from ....model.layout import CLEAN, diffusion
from ....model.policy import Policy
from .config import Loss
from .rewards import LearningSample


@dataclass(frozen=True)
class Update:
    """What one optimiser step learns from: its samples and tokens, and how many of the samples carry mask rows."""

    samples: int
    tokens: int
    drafted: int


@dataclass(frozen=True)
class Figures:
    """What one pack says: its N tokens; sums over them (clipped: 1 where the clip bounds; kl: log p_old - log p_new; ratio:
    rho); the mean overlap of p and q over its mask rows, and the samples those belong to."""

    tokens: int
    clipped: float
    kl: float
    ratio: float
    overlap: float
    drafted: int


def mask_blocks(sample: LearningSample, size: int, draw: random.Random) -> list[tuple[int, int]]:
    """(start, length) of mask blocks over a sample's answer; the first one has a random length, as no alignment is special."""
    start = len(sample.trajectory.prompt_tokens)
    first = start + draw.randint(1, size)
    return [(s, size) for s in (start, *range(first, start + len(sample.trajectory.tokens), size))]


def pack_loss(
    policy: Policy,
    pack: Sequence[LearningSample],
    blocks: Sequence[list[tuple[int, int]]],
    update: Update,
    temperature: float,
    loss: Loss,
) -> tuple[torch.Tensor, Figures]:
    """The pack's part of the update's loss.

    Args:
        blocks: the mask blocks of each sample; empty for one that trains no draft.
    """
    trajectories = [sample.trajectory for sample in pack]
    texts = [[*t.prompt_tokens, *t.tokens] for t in trajectories]
    layout, target_T = diffusion(texts, blocks, policy.mask_token_id)
    hidden_TD = policy(layout)
    prompt_T = torch.tensor([len(t.prompt_tokens) for t in trajectories])[layout.sequence_T]
    clean_T = layout.block_T == CLEAN
    rows = torch.nonzero(clean_T & (target_T >= 0) & (layout.position_T >= prompt_T - 1))[:, 0]
    logits_NV = policy.head(hidden_TD[rows]).float()
    new_N = (logits_NV / temperature).log_softmax(-1).gather(1, target_T[rows, None])[:, 0]
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
    value, overlap, drafted = -(scale_N * gain_N).sum(), 0.0, sum(map(bool, blocks))
    if loss.kl_weight:
        log_r_N = torch.from_numpy(np.concatenate([sample.reference for sample in pack])) - new_N
        value = value + loss.kl_weight * (scale_N * (log_r_N.exp() - 1 - log_r_N)).sum()
    if drafted:
        prompts = [len(t.prompt_tokens) for t in trajectories]
        draft, _, overlap = draft_loss(policy, hidden_TD, layout, target_T, prompts, loss.draft, temperature)
        value = value + loss.draft_weight * draft * drafted / update.drafted
    clipped = (ratio_N * advantage_N > bounded_N * advantage_N).float().sum().item()
    detached_N = ratio_N.detach()
    return value, Figures(len(rows), clipped, -detached_N.log().sum().item(), detached_N.sum().item(), overlap, drafted)
