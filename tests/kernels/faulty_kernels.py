"""One kernel per way to fail the check, and one per figure of its assembly; run by test_check.py in a process that compiles.
Prints faults and figures as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

import torch
import triton
import triton.language as tl

from blockroll.kernels.check import inspect
from blockroll.kernels.launch import Launch
from blockroll.kernels.shapes import TARGETS


@triton.jit
def product(a, b, out, K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, STEP)
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, K, STEP):
        x = tl.load(a + m[:, None] * K + start + k[None, :])
        acc = tl.dot(x, tl.load(b + (start + k[:, None]) * N + n[None, :]), acc)
    tl.store(out + m[:, None] * N + n[None, :], acc)


@triton.jit
def narrow_product(a, b, out, K, M: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr, APART: tl.constexpr, WAIT: tl.constexpr):
    """Rows of `a` and of `b` whose features lie APART elements apart; WAIT: a barrier behind each product."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, STEP)
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, K, STEP):
        x = tl.load(a + m[:, None] * 4096 + (start + k[None, :]) * APART)
        acc = tl.dot(x, tl.load(b + n[None, :] * 4096 + (start + k[:, None]) * APART), acc)
        if WAIT:
            tl.debug_barrier()
    tl.store(out + m[:, None] * N + n[None, :], acc)


@triton.jit
def copy(a, out, M: tl.constexpr):
    m = tl.arange(0, M)
    tl.store(out + m, tl.load(a + m))


@triton.jit
def changes_type(a, out):
    x = tl.load(a)
    if x > 0:
        x = tl.arange(0, 4)
    tl.store(out, x)


def tensor(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def multiply(m: int, n: int, step: int, warps: int, stages: int, dot_rows: int) -> Launch:
    arguments = dict(a=tensor(m, 256), b=tensor(256, n), out=tensor(m, n, dtype=torch.float32), K=256, M=m, N=n, STEP=step)
    return Launch(product, (1,), arguments, warps, stages, dot_rows)


def slow(m: int = 64, step: int = 64, stages: int = 3, apart: int = 1, wait: bool = False) -> Launch:
    arguments = dict(a=tensor(m, 4096), b=tensor(64, 4096), out=tensor(m, 64, dtype=torch.float32), K=1024, M=m, N=64)
    return Launch(narrow_product, (1,), dict(**arguments, STEP=step, APART=apart, WAIT=wait), 4, stages, m)


LAUNCHES = {
    "clean": multiply(64, 64, 32, 4, 2, 64),
    "spills": multiply(128, 128, 32, 1, 1, 128),
    "shared": multiply(128, 256, 64, 8, 6, 128),
    "undeclared": multiply(64, 64, 32, 4, 2, 0),
    "no matrix instruction": Launch(copy, (1,), {"a": tensor(64), "out": tensor(64), "M": 64}, 4, 1, 64),
    "does not compile": Launch(changes_type, (1,), {"a": tensor(4), "out": tensor(4)}, 4, 1, 0),
}

SLOW = {
    "clean": slow(),
    "2-byte loads": slow(apart=3),
    "barriers": slow(wait=True),
    "occupancy": slow(m=256),
    "wait right behind the load": slow(stages=1),
}

if __name__ == "__main__":
    targets = [TARGETS[name] for name in ("gfx942", "sm_90")]
    print(
        json.dumps(
            {
                target.name: {
                    "faults": {name: inspect(launch, target).faults for name, launch in LAUNCHES.items()},
                    "figures": {name: asdict(inspect(launch, target).figures) for name, launch in SLOW.items()},
                }
                for target in targets
            }
        )
    )
