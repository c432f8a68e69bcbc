"""Sizes of the bench: those of ZAYA1-8B on a device, and very small ones for Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import ZayaConfig

from ....model.checkpoint import read_config, resolve
from ...schedule import Schedule

FORCED = (4.6, 6.8)
"""Tokens that a step with a whole block of drafts commits, each draft being accepted alike: ZAYA1-8B-Diffusion-Preview's
published figure, and that of the published H100 run at batch 16. The last one is forced while steps are measured."""


@dataclass(frozen=True)
class Sizes:
    """One set of sizes.

    Attributes:
        dtype: of weights and cache. config: changes to ZAYA1-8B's own.
        copy_bytes, matmul: of the ceilings. kernel_rows: rows of a kernel's pack. batches, contexts: of kernels and steps.
        attention: (batch, rows per sequence, context) of the attention kernel.
        schedules: of the decode steps, `ar` first.
        seconds: measured per item, after warming up. repeats: fewest measurements.
        steps: fewest decode steps measured. sample_steps: fewest steps of single samples that their tokens are counted over.
        oracles: (batch, context) of the steps that verify the known continuation.
        trained: policies of the training steps, by name. trained_tokens: clean tokens of their document.
    """

    dtype: torch.dtype
    copy_bytes: int
    matmul: int
    page_size: int
    kernel_rows: tuple[int, ...]
    attention: tuple[tuple[int, int, int], ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    schedules: tuple[Schedule, ...]
    seconds: float
    repeats: int
    steps: int
    sample_steps: int
    trained: Mapping[str, Callable[[], ZayaConfig]]
    trained_tokens: int
    oracles: tuple[tuple[int, int], ...]
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def zaya(self) -> ZayaConfig:
        """The policy's configuration."""
        return ZayaConfig(**self.config)


DEVICE = Sizes(
    dtype=torch.bfloat16, copy_bytes=4 << 30, matmul=8192, page_size=32,
    kernel_rows=(1, 16, 64, 512, 1024, 2048, 4096),
    attention=(
        (1, 1, 16384), (16, 1, 2048), (64, 1, 16384), (32, 16, 16384), (32, 32, 16384), (32, 64, 16384), (16, 32, 2048),
        (64, 32, 16384), (128, 32, 2048),
    ),
    batches=(1, 8, 16, 32, 64, 128), contexts=(2048, 16384),
    schedules=(
        Schedule("ar"), Schedule("fused", levels=(0,)), Schedule("two_pass"), Schedule("fused", levels=(0,), block=8),
        Schedule("fused", levels=(0, 4, 8)),
    ),
    seconds=0.25, repeats=7, steps=24, sample_steps=192,
    trained={
        "tiny-reasoner": lambda: read_config(resolve("tiny-reasoner")),
        "ZAYA1-8B, 1 layer": lambda: ZayaConfig(
            num_hidden_layers=1, layer_types=["hybrid"], diffusion={"block_size": 16, "mask_token_id": 262271}
        ),
    },
    trained_tokens=131072, oracles=((16, 2048), (64, 2048)),
)  # fmt: skip

_FEW = dict(
    vocab_size=70, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    moe_intermediate_size=24, num_experts=3, router_hidden_size=16, max_position_embeddings=160, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, layer_types=["hybrid"], diffusion={"block_size": 4, "mask_token_id": 69},
)  # fmt: skip

DRY = Sizes(
    dtype=torch.float32, copy_bytes=1 << 16, matmul=32, page_size=8, kernel_rows=(1, 5),
    attention=((2, 5, 9),), batches=(2,), contexts=(9,),
    schedules=(Schedule("ar"), Schedule("fused", levels=(0, 2)), Schedule("two_pass", 2)), seconds=0.0, repeats=1,
    steps=1, sample_steps=0,
    trained={"few numbers": lambda: ZayaConfig(**_FEW)}, trained_tokens=64, oracles=((2, 9),), config=_FEW,
)  # fmt: skip
