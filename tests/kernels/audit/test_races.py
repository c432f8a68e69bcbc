"""Programs of one launch do not race, whatever their order: every kernel, on the calls of `bench gpu`."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch

pytest.importorskip("triton")

from kernel_audit import Audit

from blockroll.kernels.cutoffs import cut_, edges
from blockroll.kernels.dispatch import using
from blockroll.kernels.linear.triton import linear
from blockroll.rollout.bench.gpu.kernels import KernelBench
from blockroll.rollout.bench.gpu.sizes import DRY

ATTENTION = (2, 5, 70)
"""Sequences, rows and cached positions: several programs share the keys of a tile."""


@cache
def bench() -> KernelBench:
    return KernelBench(dataclasses.replace(DRY, attention=(ATTENTION,), kernel_rows=(5, 21)), torch.device("cpu"))


def edges_of_rows() -> None:
    logits = torch.randn(3, 2, 40, generator=torch.Generator().manual_seed(0)) * 2
    wide = torch.ones(3, dtype=torch.float64)
    found = edges(logits, wide, torch.tensor([0, 7, 0]), wide * 0.8, wide * 0.01)
    cut_(logits, wide, found)


CALLS = {
    "attention": lambda: bench().attention(*ATTENTION),
    "cca": lambda: bench().cca(5),
    "router": lambda: bench().router(21),
    "experts": lambda: bench().experts(21),
    "residual": lambda: bench().residual(5),
    "verify": lambda: bench().verify(2),
    "cut-offs": edges_of_rows,
    "linear": lambda: linear(torch.randn(70, 9), torch.randn(80, 9)),
}
SLOW = ("verify", "cut-offs")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CALLS])
@pytest.mark.parametrize("invariant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_programs_race(name, invariant):
    with using("triton", batch_invariant=invariant), Audit() as audit:
        CALLS[name]()
    assert audit.launches and max(launch.programs for launch in audit.launches) > 1
    audit.check_races()
