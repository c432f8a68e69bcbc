"""Optimiser steps over samples with advantages.

Invariants:
- What a step computes depends on the weights before it, the samples and their order, the configuration and the step's
  number: nothing is drawn from a global generator, and gradients are summed in an order that the packs decide.
- Replicas share the policy's parameters in memory and have gradients of their own, so packs are computed by several
  threads at once: torch releases the interpreter's lock inside its operations.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ....model import packing
from ....model.policy import Policy
from ....seeds import named_generator
from .config import GrpoConfig
from .loss import Blocks, Figures, Update, computed_draft_weights, draft_weight, mask_blocks, pack_loss
from .rewards import LearningSample

Pack = tuple[list[LearningSample], list[Blocks]]


@dataclass(frozen=True)
class Progress:
    """Figures of one trainer step over its updates: means over tokens, `overlap` over samples with mask rows, and the
    gradient's norm before clipping in the last update. None where nothing was trained."""

    kl: float | None = None
    clip_fraction: float | None = None
    ratio: float | None = None
    overlap: float | None = None
    gradient_norm: float | None = None


class Learner:
    """Trains a policy in place.

    Args:
        policy: in float32, on a CPU.
    """

    def __init__(self, policy: Policy, config: GrpoConfig) -> None:
        self._config, self.policy = config, policy.train().requires_grad_(True)
        self._replicas = [policy, *(_replica(policy) for _ in range(config.optimizer.threads - 1))]
        self.optimizer = torch.optim.AdamW(
            policy.parameters(), lr=config.optimizer.learning_rate, weight_decay=0.0, foreach=True
        )

    def step(self, step: int, samples: Sequence[LearningSample]) -> Progress:
        """`updates_per_step` optimiser steps over the samples in their order; none without samples.

        Args:
            step: number of the trainer's step, from 1; decides the learning rate and where mask blocks lie.
        """
        if not samples:
            return Progress()
        options, figures, norm = self._config.optimizer, [], 0.0
        warm, left = step / (options.warmup_steps + 1), 1 - (step - 1) / self._config.steps
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate * min(1.0, warm) * left
        draw = named_generator(self._config.seed, f"blocks/{step}")
        size = -(-len(samples) // options.updates_per_step)
        for start in range(0, len(samples), size):
            update, packs = self._packs(samples[start : start + size], draw)
            figures += self._gradients(update, packs)
            norm = float(torch.nn.utils.clip_grad_norm_(self.policy.parameters(), options.clip, foreach=True))
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        tokens, drafted = sum(f.tokens for f in figures), sum(f.drafted for f in figures)
        return Progress(
            kl=sum(f.kl for f in figures) / tokens,
            clip_fraction=sum(f.clipped for f in figures) / tokens,
            ratio=sum(f.ratio for f in figures) / tokens,
            overlap=sum(f.overlap * f.drafted for f in figures) / drafted if drafted else None,
            gradient_norm=norm,
        )

    def _packs(self, samples: Sequence[LearningSample], draw: random.Random) -> tuple[Update, list[Pack]]:
        """Packs samples of similar length, at most `pack_rows` clean rows in a pack, and chooses their mask blocks."""
        loss, size = self._config.loss, self.policy.block_size
        drafting = set(draw.sample(range(len(samples)), round(loss.draft_share * len(samples)) or 1))
        blocks = [mask_blocks(len(s.trajectory.prompt_tokens), s.rows, size, draw) if loss.draft_weight and i in drafting else []
                  for i, s in enumerate(samples)]  # fmt: skip
        order = sorted(range(len(samples)), key=lambda i: (bool(blocks[i]), samples[i].rows))
        numbers = packing.packs(order, lambda i: samples[i].rows, self._config.optimizer.pack_rows)
        packs: list[Pack] = [([samples[i] for i in pack], [blocks[i] for i in pack]) for pack in numbers]
        if loss.draft.slots == "all" and not loss.draft.sampled:
            weights = draft_weight(samples, blocks, loss.draft.slot_decay), 0.0
        else:
            weights = computed_draft_weights(self.policy, packs, self._config.rollouts.temperature, loss)
        return Update(len(samples), sum(len(s.trajectory.tokens) for s in samples), *weights), packs

    def _gradients(self, update: Update, packs: Sequence[Pack]) -> list[Figures]:
        """Adds the update's gradient to the policy's parameters."""
        replicas = self._replicas[: len(packs)]

        def compute(number: int) -> list[Figures]:
            torch.set_num_threads(1)  # OpenMP's setting belongs to the thread
            found = []
            for pack, blocks in packs[number :: len(replicas)]:
                value, figures = pack_loss(
                    replicas[number], pack, blocks, update, self._config.rollouts.temperature, self._config.loss
                )
                value.backward()
                found.append(figures)
            return found

        if len(replicas) == 1:
            return compute(0)
        with ThreadPoolExecutor(len(replicas)) as threads:
            found = list(threads.map(compute, range(len(replicas))))
        for replica in replicas[1:]:
            for own, other in zip(self.policy.parameters(), replica.parameters(), strict=True):
                if other.grad is not None:
                    own.grad = other.grad if own.grad is None else own.grad.add_(other.grad)
                    other.grad = None
        return [figures for part in found for figures in part]


def _replica(policy: Policy) -> Policy:
    """A policy over the same parameters and buffers, with gradients of its own."""
    tokenizer, policy.tokenizer = policy.tokenizer, None
    try:
        replica = copy.deepcopy(policy)
    finally:
        policy.tokenizer = tokenizer
    for own, shared in zip([*replica.parameters(), *replica.buffers()], [*policy.parameters(), *policy.buffers()], strict=True):
        own.data = shared.data
    return replica
