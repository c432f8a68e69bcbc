"""Attention on a CPU: what one sequence left in the working memory reaches no other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from blockroll.model.backends.packed.attention import Attention
from blockroll.model.backends.packed.plan import PackedPlan
from blockroll.model.layout import causal

HEADS, KV_HEADS, SIZE = 4, 2, 32


@pytest.mark.parametrize("rows", [15, 16, 23, 32])
@pytest.mark.parametrize("window", [None, 5, 13])
def test_values_that_are_not_finite_stay_in_their_sequence(rows: int, window: int | None) -> None:
    memory: dict[str, torch.Tensor] = {}

    def take(name: str, *shape: int) -> tuple[torch.Tensor, np.ndarray]:
        tensor = memory.setdefault(name, torch.zeros(2**20))[: math.prod(shape)].view(shape)
        return tensor, tensor.numpy()

    attention = Attention(HEADS, KV_HEADS, SIZE, take)

    def attended(count: int, value: float | None = None) -> torch.Tensor:
        draw = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(48, heads, SIZE, generator=draw)[:count].numpy() for heads in (HEADS, KV_HEADS, KV_HEADS))
        if value is not None:
            v[:] = value
        plan, out_THD = PackedPlan.of(causal([[0] * count]), None, 2, {"hybrid": window}), torch.empty(count, HEADS, SIZE)
        attention.prepare(plan)
        attention(plan, "hybrid", q, k, v, k, v, out_THD.numpy())
        return out_THD

    before = attended(rows)
    attended(48, float("nan"))
    assert torch.equal(attended(rows), before)
