"""Kernels compiled ahead with several processes, for sections that would compile them one after another: Triton keeps
what it has compiled on disk, by its contents.

Invariants: nothing is judged here. A kernel that does not compile, or fails its check, does so again in the section that
reports it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing import get_context
from typing import Any

import torch

from ....kernels.check import check
from ....kernels.dispatch import using
from ....kernels.launch import architecture
from ....kernels.shapes import TARGETS
from .checks import CHECKS, checked
from .sizes import DEVICE, DRY

_MOST_COMPILERS = 16
"""Each imports torch and holds about a gigabyte; a usual node has hundreds of cores, and a few hundred variants to compile."""


def compilers() -> int:
    """Processes that compile: one for each core this process may use, within the bound."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_COMPILERS)


def compile_kernels() -> dict[str, Any]:
    """Every variant that the engine launches at ZAYA1-8B's sizes on this device."""
    start, target = time.time(), architecture()
    reports = check(targets=(target,), workers=compilers()) if target in TARGETS else []
    faults = [f"{r.op}, {r.case}, {r.shape}: {', '.join(r.faults)}" for r in reports if r.faults]
    return {"target": target, "variants": len(reports), "faults": faults, "seconds": time.time() - start}


def compile_checks(dry: bool) -> dict[str, Any]:
    """What the checks launch, float32 among it: all of them are run at once, and their results thrown away."""
    start, names = time.time(), list(CHECKS)[:1] if dry else list(CHECKS)
    with ProcessPoolExecutor(min(len(names), compilers()), mp_context=get_context("spawn")) as pool:
        wait([pool.submit(_discarded, name, dry) for name in names])
    return {"checks": len(names), "seconds": time.time() - start}


def _discarded(name: str, dry: bool) -> None:
    sizes, device = (DRY, torch.device("cpu")) if dry else (DEVICE, torch.device("cuda"))
    with torch.inference_mode(), using("triton" if dry else "auto"):
        checked(name, sizes, device)


def items(dry: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """By name. The interpreter compiles nothing."""
    checks = {"checks": lambda: compile_checks(dry)}
    return checks if dry else {"kernels": compile_kernels, **checks}
