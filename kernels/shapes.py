"""Shapes that kernels are compiled for: the devices, the policies, and the packs that an engine runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from .launch import Shape


@dataclass(frozen=True)
class Target:
    """A device: its backend for Triton, threads of a warp, and the bytes of shared memory (LDS) one program may have."""

    name: str
    backend: str
    arch: Any
    warp: int
    shared: int


TARGETS = {
    target.name: target
    for target in (
        Target("gfx942", "hip", "gfx942", 64, 65536),
        Target("gfx950", "hip", "gfx950", 64, 163840),
        Target("sm_90", "cuda", 90, 32, 232448),
    )
}

ZAYA1_8B = Shape(
    name="zaya1-8b", dtype=torch.bfloat16, hidden=2048, heads=8, kv_heads=2, head_dim=128, rotary=64, conv=(2, 2),
    experts=16, ffn=2048, router=256, vocab=262272, window=None, page_size=32, sequences=(1, 8, 16, 32, 64, 128),
    rows=(1, 17, 33, 49, 65), prefill=2048, context=16384, positions=1 << 17, large_positions=1 << 23,
)  # fmt: skip
TINY_REASONER = Shape(
    name="tiny-reasoner", dtype=torch.float32, hidden=128, heads=4, kv_heads=2, head_dim=32, rotary=16, conv=(2, 2),
    experts=4, ffn=256, router=32, vocab=274, window=None, page_size=32, sequences=(1, 8, 32),
    rows=(1, 17, 33, 49), prefill=512, context=512, positions=1 << 14, large_positions=1 << 25,
)  # fmt: skip
SHAPES = (
    ZAYA1_8B,
    replace(ZAYA1_8B, name="zaya1-8b sliding", window=4096),
    TINY_REASONER,
    replace(TINY_REASONER, name="tiny-reasoner bf16", dtype=torch.bfloat16),
)
