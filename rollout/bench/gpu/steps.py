"""Decode steps of the whole policy with random weights: seconds by schedule, batch and context.

Legend: S sequences of a step.
"""

from __future__ import annotations

import statistics
import time
from functools import cached_property
from typing import Any

import torch

from ....model.policy import Policy
from .parts import DecodeStep, FilledCache, force_experts, random_policy
from .sizes import Sizes
from .timing import timed

_RESERVE = 24 << 30
"""Bytes left for logits, activations and captured steps."""
_SPLIT = (1, 16, 64)
"""Batches whose forwards are also timed alone."""


class StepBench:
    """The steps of one process, by item name (`items`): small contexts and large batches first, where the claims are."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        order = [
            (schedule, batch, context)
            for schedules in (sizes.schedules[:3], sizes.schedules[3:])
            for context in sizes.contexts
            for batch in sorted(sizes.batches, key=lambda batch: (batch not in (16, 64), batch))
            for schedule in schedules
        ]
        self.items = {
            f"{schedule.within(self._block).label} {batch} at {context}": (schedule, batch, context)
            for schedule, batch, context in order
        }

    @property
    def _block(self) -> int:
        return (getattr(self.sizes.zaya, "diffusion", None) or {}).get("block_size", 16)

    @cached_property
    def policy(self) -> Policy:
        """The whole policy."""
        policy = random_policy(self.sizes.zaya, self.sizes.dtype, self.device)
        force_experts(policy, max(self.sizes.batches) * 6 * policy.block_size)
        return policy

    @cached_property
    def filled(self) -> FilledCache:
        """As many positions as the largest batch and context need, or as fit."""
        config, block = self.policy.config, self.policy.block_size
        each = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * self.sizes.dtype.itemsize
        positions = max(self.sizes.batches) * (max(self.sizes.contexts) + 2 * block + 2 + self.sizes.page_size)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            positions = min(positions, (torch.cuda.mem_get_info()[0] - _RESERVE) // each)
        return FilledCache(self.policy, positions, max(self.sizes.batches), self.sizes.page_size, block + 1)

    def run(self, name: str) -> dict[str, Any]:
        """One item's row: seconds of the step on the device, of its forwards alone, and of what the host prepares."""
        schedule, batch, context = self.items[name]
        step = DecodeStep(self.policy, self.filled, schedule, batch, context)
        whole = timed(step.run, self.sizes, self.device)
        row: dict[str, Any] = whole | {
            "schedule": step.schedule.label, "kind": step.schedule.kind, "batch": batch, "context": context,
            "rows": step.rows, "passes": len(step.passes), "host_seconds": self._host(step),
        }  # fmt: skip
        if self.device.type == "cuda" and batch in _SPLIT:
            row["forward_seconds"] = timed(step.forward, self.sizes, self.device)["seconds"]
        del step
        if self.device.type == "cuda":
            row["memory_bytes"] = torch.cuda.max_memory_allocated()
            torch.cuda.empty_cache()
        return row

    def _host(self, step: DecodeStep) -> float:
        """Layouts, plans and their way to the device."""
        seconds = []
        for _ in range(self.sizes.repeats):
            start = time.perf_counter()
            step.host()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)
