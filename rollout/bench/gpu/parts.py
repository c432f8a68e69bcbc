"""The parts that the bench measures: a policy with random weights, a filled cache, and forward passes over it.

Invariants:
- The policy, its layouts and plans, the cache and the kernels are the engine's own. A forward asks nothing of the host, so it
  can be captured.
- Experts are drawn uniformly, whatever the router chose: a random router sends similar rows to one expert.

Legend: S sequences, T rows, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from transformers import ZayaConfig

from ....model.layout import DecodeRows, TokenLayout, decode
from ....model.paged import PagedPlan
from ....model.plan import Plan
from ....model.policy import Layer, Policy
from ...cache import BlockTable, CacheView, PagedCache, pages_for
from ...schedule import Schedule

_DRAWN = 4099
"""Experts that are drawn for each layer: a prime, so that keys spread."""


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def random_policy(config: ZayaConfig, dtype: torch.dtype, device: torch.device) -> Policy:
    """Random weights, made on the device."""
    with _default_dtype(dtype), torch.device(device):
        policy = Policy(config)
    for layer in layers(policy):  # buffers stay in float32, as `load_policy` keeps them
        router = layer.mlp.gate
        router.balancing_biases = torch.nn.Buffer(router.balancing_biases.float())
    policy.initialise(torch.Generator(device).manual_seed(0))
    policy.pack()
    return policy.requires_grad_(False).eval()


def layers(policy: Policy) -> list[Layer]:
    """The policy's layers."""
    return cast(list[Layer], list(policy.model.layers))


def force_experts(policy: Policy) -> None:
    """Every row's expert drawn uniformly and layer by layer, whatever the router says; its work is still done. The draw depends
    on the row's sequence and position, and on whether it is a mask row: so a token has the same experts under any schedule."""
    experts, count = policy.config.num_experts, len(layers(policy))
    generator = torch.Generator(policy.device).manual_seed(0)
    drawn_LN = torch.randint(0, experts, (count, _DRAWN), generator=generator, device=policy.device)
    present = [drawn_LN]

    def draw(_module: Any, arguments: Any) -> None:
        layout: TokenLayout = arguments[0]
        key_T = layout.position_T * 61 + layout.sequence_T * 977 + (layout.block_T >= 0) * 331
        present[0] = drawn_LN[:, key_T % _DRAWN]

    policy.register_forward_pre_hook(draw)
    for number, layer in enumerate(layers(policy)):

        def uniform(_module: Any, _arguments: Any, chosen: Any, number: int = number) -> Any:
            _, *rest = chosen
            return present[0][number], *rest

        layer.mlp.gate.register_forward_hook(uniform)


def fill(cache: PagedCache) -> None:
    """Random numbers in every page and tail."""
    for pool in (cache.k, cache.v, cache.x, cache.delayed):
        for layer in pool:
            layer.normal_()


class FilledCache:
    """A cache with random contents, dealt to sequences in shuffled pages."""

    def __init__(self, policy: Policy, positions: int, sequences: int, page_size: int, decode_rows: int) -> None:
        pages = pages_for(positions, page_size) + sequences
        self.sequences = sequences
        self.cache = PagedCache(policy, pages, page_size, sequences, decode_rows)
        fill(self.cache)

    def held(self, contexts: Sequence[int], rows: int) -> list[BlockTable]:
        """Sequences with so many cached positions each, and room for `rows` more."""
        size = self.cache.page_size
        free = torch.randperm(self.cache.total_pages, generator=torch.Generator().manual_seed(0)).tolist()
        out = []
        for slot, context in enumerate(contexts):
            count = pages_for(context + rows, size)
            if count > len(free) or len(contexts) > self.sequences:
                raise ValueError(f"{len(contexts)} sequences of {max(contexts)} positions do not fit the cache")
            out.append(BlockTable(slot, np.array([free.pop() for _ in range(count)], dtype=np.int64), context))
        return out


@dataclass
class ForwardPass:
    """One forward pass over a layout: `run` gives hidden_TD."""

    policy: Policy
    layout: TokenLayout
    view: CacheView
    plan: Plan
    rows: int
    sequences: int

    @property
    def paged(self) -> PagedPlan:
        """Its plan, as kernels take it."""
        assert isinstance(self.plan, PagedPlan), "kernels are off here"
        return self.plan

    @classmethod
    def of(cls, policy: Policy, cache: PagedCache, held: Sequence[BlockTable], plans: Sequence[DecodeRows]) -> ForwardPass:
        """Everything the host prepares for a pass."""
        layout = decode(plans, policy.mask_token_id)
        view = cache.view(held, layout)
        plan = policy.plan(layout, view)
        return cls(policy, layout.to(policy.device), view, plan, layout.rows // len(plans), len(plans))

    def run(self) -> torch.Tensor:
        """hidden_TD."""
        return self.policy(self.layout, self.view, plan=self.plan)


def passes(policy: Policy, cache: PagedCache, held: Sequence[BlockTable], schedule: Schedule) -> list[ForwardPass]:
    """The forwards of a step of `schedule` (with sizes) over these sequences, whose every draft is verified."""
    drafts = schedule.drafts or 0
    token = torch.randint(0, policy.mask_token_id, (len(held), drafts + 1)).tolist()
    sequences = list(zip(token, (each.length for each in held), strict=True))
    if schedule.kind == "two_pass":
        first = [DecodeRows(row[:1], start, (1,), drafts) for row, start in sequences]
        shapes = [first, [DecodeRows(row[1:], start + 1, (), 0) for row, start in sequences]]
    elif schedule.kind == "fused":
        levels = tuple(level + 1 for level in schedule.levels)
        shapes = [[DecodeRows(row, start, levels, schedule.block or 0) for row, start in sequences]]
    else:
        shapes = [[DecodeRows(row[:1], start, (), 0) for row, start in sequences]]
    return [ForwardPass.of(policy, cache, held, plans) for plans in shapes]
