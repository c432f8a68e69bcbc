"""A conversion's step over one long document, and a plain autoregressive step over the same: clean tokens per second.

Invariants:
- Both are the conversion's own `train_step`, its pack laid out within the time, with the settings of
  `configs/conversion/extend_128k.yaml`: bfloat16 products, layers computed again in the backward pass, AdamW. The diffusion
  step has a mask row for every token beside the clean rows, which are all that the other one has.
- Weights and tokens are random. The first step, which compiles, is not counted.
"""

from __future__ import annotations

import random
import statistics
import time
from typing import Any, Literal

import torch
from transformers import ZayaConfig

from ....kernels.dispatch import using
from ....model.conversion.config import DraftLoss, Stage
from ....model.conversion.data import Document
from ....model.conversion.distributed import Group
from ....model.conversion.stage import Pack, make_optimizer, train_step
from ....model.policy import Policy
from .sizes import Sizes

Kind = Literal["ar", "diffusion"]
_STEPS = 2
"""Steps that are timed."""
_SETTINGS: dict[str, Any] = dict(
    learning_rate=1e-4, betas=(0.9, 0.95), weight_decay=0.1, draft=DraftLoss(ce=0.5, tv=1.0, slot_decay=0.95),
    balance_rate=2e-4, autocast="bfloat16", activation_checkpointing=True,
)  # fmt: skip


class TrainingBench:
    """What one process trains, by item name (`items`): each policy of the sizes, plainly and towards block diffusion."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        kinds: tuple[Kind, ...] = ("ar", "diffusion")
        self.items = {f"{name} {kind}": (name, kind) for name in sizes.trained for kind in kinds}

    def run(self, item: str) -> dict[str, Any]:
        """One item's row: seconds of a step, clean tokens per second, losses (nats per token), and memory on a device."""
        name, kind = self.items[item]
        config, tokens = self.sizes.trained[name](), self.sizes.trained_tokens
        block, mask = config.diffusion["block_size"], config.diffusion["mask_token_id"]
        stage = Stage(name=kind, kind=kind, tokens=tokens, pack_tokens=tokens, block_length=(block, block), **_SETTINGS)
        draw = random.Random(0)
        document = Document([draw.randrange(mask) for _ in range(tokens)], 1)
        with torch.inference_mode(False), using("auto"):
            policy = self._policy(config, stage)
            optimizer, group = make_optimizer(policy, stage), Group(device=self.device)
            seconds, rows, figures = [], 0, None
            for _ in range(1 + _STEPS):
                start = time.perf_counter()
                pack = Pack.of([document], stage, mask, random.Random(0))  # of the same rows: compiled once
                figures = train_step(policy, optimizer, stage, [pack], group)  # read back: it has ended
                seconds.append(time.perf_counter() - start)
                rows = pack.layout.rows
        assert figures is not None
        median = statistics.median(seconds[1:])
        row = {
            "policy": name, "kind": kind, "tokens": tokens, "rows": rows, "seconds": median, "first_seconds": seconds[0],
            "tokens_per_s": tokens / median, "ar_loss": figures.ar, "draft_loss": figures.draft,
        }  # fmt: skip
        return row | ({"memory_bytes": torch.cuda.max_memory_allocated()} if self.device.type == "cuda" else {})

    def _policy(self, config: ZayaConfig, stage: Stage) -> Policy:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with self.device:
            policy = Policy(config)
        policy.initialise(torch.Generator(self.device).manual_seed(0))
        policy.recompute_layers = stage.activation_checkpointing
        return policy.train().requires_grad_(True)
