"""Compiles every kernel in every shape that the engine launches. The accelerator compiled for need not be in this machine.

Invariants:
- What is compiled is what host code launches: each op's `cases` run its own host code on `meta` tensors under
  `launch.record`, and the recorded arguments go through Triton's own specialisation (divisibility, and on AMD the
  32-bit pointer range, which a tensor over 2 GiB does not have).
- A launch fails the check if it does not compile, spills vector registers, uses stack, or takes more shared memory than the
  device has (the compiler does not compare). It also fails if its matrix product compiles to no matrix instructions, if the
  host code does not declare the product, or if a figure of its assembly is worse than its bound (`isa/`).
- The check and the interpreter need separate processes: Triton reads `TRITON_INTERPRET` when a kernel is defined.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from typing import Any

import torch

from .isa import Figures, bounds, excesses, usage
from .launch import Case, Launch, record
from .shapes import SHAPES, TARGETS, Target

OPS = ("attention", "cca", "experts", "linear", "residual", "verify", "cutoffs", "philox")
"""Folders whose `triton.py` has `cases(shape)`."""


@dataclass(frozen=True)
class Report:
    """What one compiled launch uses.

    Attributes:
        registers: vector registers of a thread. spills: of them spilled. stack: bytes per thread. shared: bytes.
        dots: matrix instructions in it.
        variant: what its bounds are kept under, beside target and kernel: the policy and the rows of its tile, and its case
            where that has bounds of its own.
        figures: of its assembly; None where it did not compile.
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
    variant: str
    figures: Figures | None
    faults: tuple[str, ...]


@dataclass(frozen=True)
class _Job:
    """The key by which another process finds a launch, the rows of its matrix product's tile, and `Report.variant`."""

    target: str
    shape: int
    op: str
    case: str
    index: int
    kernel: str
    dot_rows: int
    variant: str


class _Driver:
    """The active device, for Triton's compiler. Nothing is ever launched on it."""

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


@lru_cache(maxsize=64)
def _launches(target: str, shape: int, op: str) -> tuple[tuple[Case, int, Launch], ...]:
    """Case, number within the case, and launch. The order is the same in every process."""
    found: list[tuple[Case, int, Launch]] = []
    for case in importlib.import_module(f"{__package__}.{op}.triton").cases(SHAPES[shape]):
        with record(target) as launches:
            case.call()
        found += [(case, index, each) for index, each in enumerate(launches)]
    return tuple(found)


def _key(launch: Launch, target: Target) -> tuple[Any, ...]:
    """Two launches with equal keys compile to the same code."""

    def of(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            aligned = value.storage_offset() * value.element_size() % 16 == 0
            large = target.backend == "hip" and value.untyped_storage().size() >= 1 << 31
            return str(value.dtype), aligned, large
        return ("=", value)

    key: list[Any] = []
    for parameter in launch.kernel.params:
        value = launch.arguments.get(parameter.name, parameter.default)
        number = isinstance(value, int) and not isinstance(value, bool) and not parameter.is_constexpr
        if number:
            special = not parameter.do_not_specialize
            key.append((special and value == 1, special and value % 16 == 0, value >= 1 << 31))
        elif isinstance(value, float) and not parameter.is_constexpr:
            key.append("float")
        else:
            key.append(of(value))
    return launch.kernel.__name__, launch.warps, launch.stages, tuple(sorted(launch.options.items())), tuple(key)


def jobs(
    targets: Iterable[str] = tuple(TARGETS),
    ops: Iterable[str] = OPS,
    quick: bool = False,
) -> list[_Job]:
    """One job per compiled variant; launches that compile to the same code are one.

    Args:
        quick: of each kernel and target only the variant with the largest tile, over 2 GiB where there is one.
    """
    found: dict[Any, _Job] = {}
    for target in targets:
        for op in ops:
            for number in range(len(SHAPES)):
                for case, index, each in _launches(target, number, op):
                    variant = _variant(SHAPES[number].name, each.dot_rows, case)
                    job = _Job(target, number, op, case.name, index, each.kernel.__name__, each.dot_rows, variant)
                    found.setdefault((target, op, _key(each, TARGETS[target])), job)
    if not quick:
        return list(found.values())
    largest: dict[Any, _Job] = {}
    for job in found.values():
        best = largest.setdefault((job.target, job.op, job.kernel), job)
        if _size(job) > _size(best):
            largest[job.target, job.op, job.kernel] = job
    return list(largest.values())


def _size(job: _Job) -> tuple[int, bool]:
    return job.dot_rows, "large" in job.case


def compile_job(job: _Job) -> Report:
    """Compile one launch, report what it uses, and compare its figures with their bounds."""
    import triton

    for case, index, each in _launches(job.target, job.shape, job.op):
        if (case.name, index) == (job.case, job.index):
            report = inspect(each, TARGETS[job.target])
            faults = list(report.faults)
            if report.figures is not None:
                name = bounds.key(job.target, f"{job.op}.{job.kernel}", job.variant)
                faults += excesses(triton.__version__, name, report.figures)
            return replace(
                report, op=job.op, case=job.case, shape=SHAPES[job.shape].name, variant=job.variant, faults=tuple(faults)
            )
    raise LookupError(f"{job} names no launch")


def _variant(shape: str, dot_rows: int, case: Case) -> str:
    tile = [f"{dot_rows}-row tile"] if dot_rows else []
    return ", ".join([shape.removesuffix(" sliding"), *tile, *([case.name] if case.apart else [])])


def inspect(launch: Launch, target: Target) -> Report:
    """Compile a launch for a target; its report without op, case, shape and variant."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.driver import driver

    driver.set_active(_Driver(target))
    name = launch.kernel.__name__
    try:
        compiled = launch.kernel.warmup(
            **launch.arguments, grid=launch.grid, num_warps=launch.warps, num_stages=launch.stages, **launch.options
        )
    except (CompilationError, RuntimeError) as error:  # MLIR and LLVM passes raise RuntimeError
        fault = f"does not compile: {str(error).strip().splitlines()[-1]}"
        return Report("", "", name, "", target.name, launch.warps, 0, 0, 0, 0, 0, "", None, (fault,))
    shared, wgmma = compiled.metadata.shared, launch.dot_rows >= 64
    used = usage(compiled.asm, target.name, launch.warps, shared, target.shared, wgmma)
    wanted = "MFMA" if target.backend == "hip" else "wgmma" if wgmma else "mma"
    undeclared = not launch.dot_rows and "tt.dot" in compiled.asm["ttir"]
    faults = [
        *([f"{used.spills} spilled registers"] if used.spills else []),
        *([f"{used.stack} bytes of stack"] if used.stack else []),
        *([f"{shared} bytes of shared memory, {target.shared} at most"] if shared > target.shared else []),
        *([f"no {wanted}"] if launch.dot_rows and not used.dots else []),
        *(["a matrix product, but its launch gives no dot_rows"] if undeclared else []),
    ]
    return Report(
        "", "", name, "", target.name, launch.warps, used.registers, used.spills, used.stack, shared, used.dots, "",
        used.figures, tuple(faults),
    )  # fmt: skip


def check(
    targets: Iterable[str] = tuple(TARGETS),
    ops: Iterable[str] = OPS,
    quick: bool = False,
    workers: int = 2,
    on_report: Callable[[Report, int], None] | None = None,
) -> list[Report]:
    """Compile every launch of the given targets and ops, by default all, on every shape.

    Args:
        quick: as for `jobs`.
        workers: processes; 1 compiles in this one. on_report: called with each report, and how many there will be.
    Raises: RuntimeError where this process interprets kernels; ImportError without triton.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, not compiled; unset it")
    importlib.import_module("triton")
    todo = jobs(targets, ops, quick)
    reports = []
    for report in _compile(todo, workers):
        reports.append(report)
        if on_report is not None:
            on_report(report, len(todo))
    return reports


def _compile(todo: Sequence[_Job], workers: int) -> Iterator[Report]:
    if workers == 1:
        yield from map(compile_job, todo)
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        yield from pool.map(compile_job, todo)
    finally:
        pool.shutdown(cancel_futures=True)
