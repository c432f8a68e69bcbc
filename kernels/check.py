"""Compiles every kernel, in every shape the engine launches it, for accelerators this machine need not have.

Invariants:
- What is compiled is what host code launches: each op's `cases` run its own host code on `meta` tensors under
  `launch.record`, and the recorded arguments go through Triton's own specialisation (divisibility, and on AMD the
  32-bit pointer range, which a tensor over 2 GiB does not have).
- A launch fails the check by spilled vector registers, stack, more shared memory than the device has (the compiler
  does not look), or a matrix product without matrix instructions.
- Not in one process with the interpreter: `TRITON_INTERPRET` decides when a kernel is defined.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from typing import Any

import torch

from .launch import Launch, Shape, record

OPS = ("attention", "cca", "experts", "residual", "verify", "philox")
"""Folders whose `triton.py` has `cases(shape)`; one without a `triton.py` has no kernel of its own."""


@dataclass(frozen=True)
class Target:
    """A device: its backend for Triton, and the bytes of shared memory (LDS) one program may have."""

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

_ZAYA = Shape(
    name="zaya1-8b", dtype=torch.bfloat16, hidden=2048, heads=8, kv_heads=2, head_dim=128, rotary=64, conv=(2, 2),
    experts=16, ffn=2048, router=256, vocab=262272, window=None, page_size=32, sequences=(1, 8, 16, 32, 64, 128),
    rows=(1, 17, 33, 49, 65), prefill=2048, context=16384, positions=1 << 17, large_positions=1 << 23,
)  # fmt: skip
_TINY = Shape(
    name="tiny-reasoner", dtype=torch.float32, hidden=128, heads=4, kv_heads=2, head_dim=32, rotary=16, conv=(2, 2),
    experts=4, ffn=256, router=32, vocab=274, window=None, page_size=32, sequences=(1, 8, 32),
    rows=(1, 17, 33, 49), prefill=512, context=512, positions=1 << 14, large_positions=1 << 25,
)  # fmt: skip
SHAPES = (
    _ZAYA,
    replace(_ZAYA, name="zaya1-8b sliding", window=4096),
    _TINY,
    replace(_TINY, name="tiny-reasoner bf16", dtype=torch.bfloat16),
)


@dataclass(frozen=True)
class Report:
    """What one compiled launch uses.

    Attributes:
        registers: vector registers of a thread. spills: of them spilled. stack: bytes per thread. shared: bytes.
        dots: matrix instructions in it.
        faults: why it fails; empty when it is clean.
    """

    op: str
    case: str
    kernel: str
    shape: str
    target: str
    warps: int
    registers: int
    spills: int
    stack: int
    shared: int
    dots: int
    faults: tuple[str, ...]


@dataclass(frozen=True)
class _Job:
    """Where a launch is found again in another process."""

    target: str
    shape: int
    op: str
    case: str
    index: int


class _Driver:
    """Stands where Triton asks for the active device; nothing is ever launched on it."""

    def __init__(self, target: Target) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget(target.backend, target.arch, target.warp)
        self._number = list(TARGETS).index(target.name)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        # Triton keeps the backend it first met on a device number.
        return self._number

    def get_current_stream(self, device: int) -> int:
        return 0


def _launches(target: str, shape: Shape, op: str) -> Iterator[tuple[str, int, Launch]]:
    """Case name, number within the case, and launch, in an order every process finds again."""
    module = f"{__package__}.{op}.triton"
    if importlib.util.find_spec(module) is None:
        return
    for case in importlib.import_module(module).cases(shape):
        with record(target) as launches:
            case.call()
        yield from ((case.name, index, each) for index, each in enumerate(launches))


def _key(launch: Launch, target: Target) -> tuple[Any, ...]:
    """Equal for launches that surely compile to the same code."""

    def of(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            aligned = value.storage_offset() * value.element_size() % 16 == 0
            large = target.backend == "hip" and value.untyped_storage().size() >= 1 << 31
            return str(value.dtype), aligned, large
        return ("=", value)

    parameters = launch.kernel.params
    arguments = launch.arguments
    key: list[Any] = []
    for parameter in parameters:
        value = arguments.get(parameter.name, parameter.default)
        number = isinstance(value, int) and not isinstance(value, bool) and not parameter.is_constexpr
        if number:
            special = not parameter.do_not_specialize
            key.append((special and value == 1, special and value % 16 == 0, value >= 1 << 31))
        elif isinstance(value, float) and not parameter.is_constexpr:
            key.append("float")
        else:
            key.append(of(value))
    return launch.kernel.__name__, launch.warps, launch.stages, tuple(key)


def jobs(
    targets: Iterable[str] = tuple(TARGETS), ops: Iterable[str] = OPS, shapes: Sequence[str] | None = None
) -> list[_Job]:
    """One job per compiled variant; launches that compile to the same code are one."""
    found: dict[Any, _Job] = {}
    for number, shape in enumerate(SHAPES):
        if shapes is not None and shape.name not in shapes:
            continue
        for target in targets:
            for op in ops:
                for case, index, each in _launches(target, shape, op):
                    found.setdefault((target, op, _key(each, TARGETS[target])), _Job(target, number, op, case, index))
    return list(found.values())


def compile_job(job: _Job) -> Report:
    """Compile one launch and look at the result."""
    shape, target = SHAPES[job.shape], TARGETS[job.target]
    for case, index, each in _found(job.target, job.shape, job.op):
        if (case, index) == (job.case, job.index):
            return _report(job, shape, target, each)
    raise LookupError(f"{job} names no launch")


@lru_cache(maxsize=64)
def _found(target: str, shape: int, op: str) -> tuple[tuple[str, int, Launch], ...]:
    return tuple(_launches(target, SHAPES[shape], op))


def _report(job: _Job, shape: Shape, target: Target, launch: Launch) -> Report:
    from triton.runtime.driver import driver

    driver.set_active(_Driver(target))
    compiled = launch.kernel.warmup(
        **launch.arguments, grid=launch.grid, num_warps=launch.warps, num_stages=launch.stages
    )
    shared = compiled.metadata.shared
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers, spills, stack = (
            int(found.group(1)) if (found := re.search(rf"\.{name}:\s+(\d+)", text)) else 0
            for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        )
        dots = len(re.findall(r"\bv_mfma_", text))
        wanted = "MFMA"
    else:
        registers, stack = _cubin_usage(compiled.asm["cubin"])
        spills = 0  # a spill of ptxas lies on the stack
        instruction = "wgmma.mma_async" if launch.dot_rows >= 64 else "mma"
        dots = len(re.findall(rf"\b{instruction}\S*\.sync", compiled.asm["ptx"]))
        wanted = "wgmma" if launch.dot_rows >= 64 else "mma"
    faults = [
        *([f"{spills} spilled registers"] if spills else []),
        *([f"{stack} bytes of stack"] if stack else []),
        *([f"{shared} bytes of shared memory, {target.shared} at most"] if shared > target.shared else []),
        *([f"no {wanted}"] if launch.dot_rows and not dots else []),
    ]
    return Report(
        job.op, job.case, launch.kernel.__name__, shape.name, target.name, launch.warps,
        registers, spills, stack, shared, dots, tuple(faults),
    )  # fmt: skip


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread, by the cuobjdump of the Triton wheel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found.group(1)), int(found.group(2))


def check(
    targets: Iterable[str] = tuple(TARGETS),
    ops: Iterable[str] = OPS,
    shapes: Sequence[str] | None = None,
    workers: int = 2,
    on_report: Callable[[Report, int], None] | None = None,
) -> list[Report]:
    """Compile every launch of the given targets, ops and shapes, by default all.

    Args:
        workers: processes; 1 compiles in this one. on_report: called with each report, and how many there will be.
    Raises: RuntimeError where this process interprets kernels; ImportError without triton.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, not compiled; unset it")
    importlib.import_module("triton")
    todo = jobs(targets, ops, shapes)
    reports = []
    if workers == 1:
        stream: Iterable[Report] = map(compile_job, todo)
        pool = None
    else:
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
        stream = pool.map(compile_job, todo)
    try:
        for report in stream:
            reports.append(report)
            if on_report is not None:
                on_report(report, len(todo))
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    return reports
