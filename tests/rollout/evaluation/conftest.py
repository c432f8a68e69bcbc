"""A small policy with a tokenizer, and a trajectory made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from blockroll.model.conversion.config import Architecture, ConversionConfig, Stage
from blockroll.model.conversion.train import new_policy
from blockroll.model.policy import Policy
from blockroll.rollout.types import StepTrace, Trajectory

SMALL = Architecture(
    hidden_size=32, layers=2, heads=2, kv_heads=1, head_dim=16, experts=2, expert_size=32, router_size=8,
    max_position_embeddings=256,
)  # fmt: skip


@pytest.fixture(scope="module")
def policy() -> Policy:
    """Random weights with a tokenizer: writes nonsense, rarely ends by itself."""
    config = ConversionConfig(
        output="unused", architecture=SMALL, block_size=8, stages=(Stage(name="ar", kind="ar", tokens=1),)
    )
    return new_policy(config).requires_grad_(False).eval()


@pytest.fixture
def by_hand():
    """by_hand(trace, prompt=, tokens=): a sample with these steps; `tokens` is a count, or the tokens."""

    def make(trace: tuple[StepTrace, ...], prompt: int, tokens: int | list[int], task: str = "a") -> Trajectory:
        made = [1] * tokens if isinstance(tokens, int) else tokens
        zeros = np.zeros(len(made), dtype=np.float32)
        return Trajectory(task, 0, tuple(range(prompt)), made, zeros, zeros, zeros.astype(np.int32), zeros.astype(bool), "stop",
                          len(trace), trace)  # fmt: skip

    return make
