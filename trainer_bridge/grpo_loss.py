"""The GRPO loss over trajectories as the service records them.

    A_i   = (r_i - mean r) / (std r + eps)                                    per group (arXiv 2402.03300)
    rho_t = exp(log p_new(t) - log p_old(t))                                  p_old: the recorded `logprobs`
    w_t   = min(exp(log p_old(t) - log behaviour(t)), cap)                    1 for samplers that draw from p
    L     = - sum_t w_t min(rho_t A, clip(rho_t) A) / number of tokens        token-level (DAPO, arXiv 2503.14476)
            + draft_weight * L_draft

Legend: T rows, N generated tokens of the pack, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..model.conversion.objective import draft_loss
from ..model.layout import CLEAN, diffusion
from ..model.policy import Policy
from ..rollout.types import Trajectory
from .grpo_config import Loss


@dataclass(frozen=True)
class Figures:
    """What one pack says: its N tokens, sums over them (clipped: 1 where the clip bounds; kl: log p_old - log p_new), and the
    draft's mean overlap."""

    tokens: int
    clipped: float
    kl: float
    overlap: float


def advantages(rewards_GK: np.ndarray, eps: float = 1e-4) -> np.ndarray:
    """Group-normalised advantages of rewards[G groups, K samples]; a group of equal rewards teaches nothing."""
    centred = rewards_GK - rewards_GK.mean(axis=1, keepdims=True)
    return centred / (rewards_GK.std(axis=1, keepdims=True) + eps)


def pack_loss(
    policy: Policy,
    pack: Sequence[tuple[Trajectory, float]],
    total_tokens: int,
    temperature: float,
    loss: Loss,
    draw: random.Random,
) -> tuple[torch.Tensor, Figures]:
    """Loss of one pack of (trajectory, advantage), already divided by the update's `total_tokens`."""
    texts = [[*t.prompt_tokens, *t.tokens] for t, _ in pack]
    blocks: list[list[tuple[int, int]]] = []
    for trajectory, _ in pack:
        start, size = len(trajectory.prompt_tokens), policy.block_size
        first = start + draw.randint(1, size)
        later = range(first, start + len(trajectory.tokens), size)
        blocks.append([(s, size) for s in (start, *later)] if loss.draft_weight else [])
    layout, target_T = diffusion(texts, blocks, policy.mask_token_id)
    hidden_TD = policy(layout)
    prompt_T = torch.tensor([len(t.prompt_tokens) for t, _ in pack])[layout.sequence_T]
    clean_T = layout.block_T == CLEAN
    rows = torch.nonzero(clean_T & (target_T >= 0) & (layout.position_T >= prompt_T - 1))[:, 0]
    logits_NV = policy.head(hidden_TD[rows]).float()
    new_N = (logits_NV / temperature).log_softmax(-1).gather(1, target_T[rows, None])[:, 0]
    old_N = torch.from_numpy(np.concatenate([t.logprobs for t, _ in pack]))
    behavior_N = torch.from_numpy(np.concatenate([t.behavior_logprobs for t, _ in pack]))
    advantage_N = torch.tensor([a for t, a in pack for _ in t.tokens], dtype=torch.float32)
    ratio_N = (new_N - old_N).exp()
    weight_N = (old_N - behavior_N).exp().clamp_max(loss.importance_cap)
    bounded_N = ratio_N.clamp(1 - loss.clip_low, 1 + loss.clip_high)
    gain_N = weight_N * torch.minimum(ratio_N * advantage_N, bounded_N * advantage_N)
    value, overlap = -gain_N.sum() / total_tokens, 0.0
    if loss.draft_weight:
        prompts = [len(t.prompt_tokens) for t, _ in pack]
        drafted, _, overlap = draft_loss(policy, hidden_TD, layout, target_T, prompts, loss.draft, temperature)
        value = value + loss.draft_weight * drafted * len(rows) / total_tokens
    clipped = (ratio_N * advantage_N > bounded_N * advantage_N).float().sum().item()
    return value, Figures(len(rows), clipped, (old_N - new_N).detach().sum().item(), overlap)
