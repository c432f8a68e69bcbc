"""Decode steps of an engine that serves the whole policy with random weights: by schedule, batch and context."""

from __future__ import annotations

import gc
from functools import cached_property
from typing import Any

import torch

from ....errors import InvalidInput
from ....kernels.dispatch import takes_triton
from ....model.policy import Policy
from ...cache import pages_for
from ...engine import Engine
from ...kv_memory import page_bytes
from ...planning.roofline import geometric_survival
from ...planning.step_costs import rows
from ...schedule import Schedule
from .parts import force_experts, passes, random_policy
from .running import engine_for, measure
from .sizes import FORCED, Sizes
from .timing import timed
from .whole_runs import replay_oracle

_RESERVE = 24 << 30
"""Bytes left for logits, activations and captured steps."""
_SPLIT = (1, 16, 64)
"""Batches whose forwards are also timed alone."""
_WARM = 5
"""Steps before the first that counts, on a device: the first ones compile what only a whole step runs."""


class StepBench:
    """The steps of one process, by item name: small contexts and large batches first, where the claims are (`order`). `items`
    have forced acceptance; `oracles` verify the known continuation.
    """

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
        fused = next(schedule for schedule in sizes.schedules if schedule.kind == "fused")
        self.oracles = {
            f"oracle {fused.within(self._block).label} {batch} at {context}": (fused, batch, context)
            for batch, context in sizes.oracles
        }
        names, first = list(self.items), len(sizes.schedules[:3]) * len(sizes.batches)
        self.order = [*names[:first], *self.oracles, *names[first:]]

    @property
    def _block(self) -> int:
        return (getattr(self.sizes.zaya, "diffusion", None) or {}).get("block_size", 16)

    @cached_property
    def policy(self) -> Policy:
        """The whole policy."""
        policy = random_policy(self.sizes.zaya, self.sizes.dtype, self.device)
        force_experts(policy)
        return policy

    def run(self, name: str) -> dict[str, Any]:
        """One item's row: what `measure` says of the engine's steps, and seconds of their forwards alone on the device."""
        if name in self.oracles:
            schedule, batch, context = self.oracles[name]
            self._make_room()
            schedule = schedule.within(self._block)
            return replay_oracle(self.policy, schedule, batch, context, self.sizes.page_size, self.sizes.steps)
        schedule, batch, context = self.items[name]
        policy, schedule = self.policy, schedule.within(self._block)
        away = self.device.type == "cuda"
        warm, count = _WARM if away else 1, max(self.sizes.steps, self.sizes.sample_steps // batch)
        # The last steps are left out: towards a sample's end fewer drafts are verified.
        tokens = (warm + count) * ((schedule.drafts or 0) + 1) + 2 * (policy.block_size + 1)
        self._make_room()
        if away:
            self._must_fit(batch, context + tokens)
        engine = engine_for(policy, schedule, batch, context, tokens, self.sizes.page_size)
        tokens_forced = min(FORCED[-1], policy.block_size)
        row: dict[str, Any] = {
            "schedule": schedule.label, "kind": schedule.kind, "batch": batch, "context": context, "rows": rows(schedule),
            "captured": away and takes_triton(policy.lm_head.weight), "forced_tokens": tokens_forced,
            # Each draft is accepted alike, so the first one's chance is every slot's.
            **measure(engine, geometric_survival(tokens_forced, policy.block_size)[:1], warm, count),
        }  # fmt: skip
        if away:
            if batch in _SPLIT:
                row["forward_seconds"] = self._forward_seconds(engine, schedule)
            row["memory_bytes"] = torch.cuda.max_memory_allocated()
        return row

    def _make_room(self) -> None:
        """Free the engine before this one, and its graphs."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _forward_seconds(self, engine: Engine, schedule: Schedule) -> float:
        """A full step's forwards over the engine's samples, captured anew and timed on the device."""
        tables = [sample.block_table for sample in engine.scheduler.running if sample.block_table is not None]
        forwards = passes(engine.policy, engine.cache, tables, schedule)
        return timed(lambda: [each.run() for each in forwards], self.sizes, self.device)["seconds"]

    def _must_fit(self, batch: int, positions: int) -> None:
        size = self.sizes.page_size
        need, free = batch * pages_for(positions, size) * page_bytes(self.policy, size), torch.cuda.mem_get_info()[0]
        if need > free - _RESERVE:
            raise InvalidInput(
                "batch", f"a cache of {batch} x {positions} positions takes {need / 1e9:.0f} GB, and of the {free / 1e9:.0f} GB "
                f"that are free {_RESERVE / 1e9:.0f} are kept for the rest of a step", "use a device with more memory",
            )  # fmt: skip
