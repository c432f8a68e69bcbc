"""Kernels use the lines that they fetch: at ZAYA1-8B's widths, what a call must move is at least 0.9 of the lines that its
kernels touch."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch

pytest.importorskip("triton")

from kernel_audit import Audit

from blockroll.kernels.cutoffs import edges
from blockroll.kernels.dispatch import using
from blockroll.rollout.bench.gpu.kernels import KernelBench
from blockroll.rollout.bench.gpu.sizes import DRY

WIDE = dict(
    vocab_size=4096 + 96, num_hidden_layers=1, layer_types=["hybrid"], num_experts=2, max_position_embeddings=2048,
    diffusion={"block_size": 16, "mask_token_id": 4000},
)  # fmt: skip
USED = 0.9


@cache
def bench() -> KernelBench:
    sizes = dataclasses.replace(
        DRY, dtype=torch.float16, page_size=32, kernel_rows=(16, 32), attention=((2, 32, 480),), batches=(2,), config=WIDE
    )
    return KernelBench(sizes, torch.device("cpu"))


CALLS = {
    "attention": lambda: bench().attention(2, 32, 480), "cca": lambda: bench().cca(16), "residual": lambda: bench().residual(32),
    "experts": lambda: bench().experts(32), "router": lambda: bench().router(32),
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "residual")) for name in CALLS])
def test_lines_hold_what_a_call_must_move(name):
    """And every kernel uses the lines that it touches."""
    with using("triton"), Audit() as audit:
        row = CALLS[name]()
    assert row["bytes"] / audit.line_bytes() >= USED, audit.line_use()


@pytest.mark.slow
def test_lines_of_logits():
    """Each reading of the logits is of whole lines."""
    rows = bench().verify(2)
    with using("triton"), Audit() as audit:
        rows = bench().verify(2)
        logits = torch.randn(2, 3, 4192)
        wide = torch.ones(2, dtype=torch.float64)
        edges(logits, wide, torch.zeros(2, dtype=torch.int64), wide * 0.9, wide * 0)
    assert rows["kind"] == "verify"
    use = audit.line_use()
    assert min(use[kernel] for kernel in ("_chunk_kernel", "_mass_kernel", "_top_kernel", "_gather_kernel")) >= USED, use
