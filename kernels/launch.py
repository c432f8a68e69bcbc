"""`launch`: the only way to start a kernel. Under `record` the check collects launches without running them.

Invariants:
- Host code launches kernels through `launch` only. Under `record` nothing runs: the launches are noted instead. Host code
  is therefore free of host synchronisation and runs on `meta` tensors, which cost no memory.
- Choices that depend on the device read `architecture()`, never torch, so that the check makes the choices of that device.
- Nothing here imports triton; `kernels/<op>/triton.py` does, and is imported on machines with an accelerator, under the
  interpreter, and by the check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: the `triton.jit` function.
        grid: programs per axis.
        arguments: everything it takes by name: tensors, numbers, constexprs.
        warps, stages: of the launch.
        dot_rows: rows of the largest matrix product in it (M of its tiles); 0 where it has none. Such a launch must
            compile to matrix instructions: MFMA, on Hopper wgmma from 64 rows and warp-level mma below.
        options: of the device's compiler, beyond warps and stages.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    stages: int
    dot_rows: int
    options: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Shape:
    """A policy's sizes, and the packs an engine runs on it.

    Attributes:
        conv: taps of the two CCA convolutions.
        rotary: features RoPE turns, of head_dim.
        window: sliding window, or None.
        sequences: batch sizes.
        rows: rows per sequence of a decode step, verify rows and mask blocks together.
        prefill: rows of a prefill chunk.
        context: most cached positions of a sequence.
        positions: of the K/V pool of one layer; with `large_positions` each of its pools is larger than 2 GiB.
    """

    name: str
    dtype: torch.dtype
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary: int
    conv: tuple[int, int]
    experts: int
    ffn: int
    router: int
    vocab: int
    window: int | None
    page_size: int
    sequences: tuple[int, ...]
    rows: tuple[int, ...]
    prefill: int
    context: int
    positions: int
    large_positions: int


@dataclass(frozen=True)
class Case:
    """One way the engine calls an op: `call` runs its host code on `meta` tensors.

    `kernels/<op>/triton.py` yields them from `cases(shape)`, for every combination that may compile to other code: batch
    sizes and rows that choose another tile, a pool or tensor over 2 GiB (`large` in its name).

    Attributes:
        apart: its kernels differ in kind from those of other cases with the same tile, so they have bounds of their own.
    """

    name: str
    call: Callable[[], object]
    apart: bool = False


_recording: list[Launch] | None = None
_architecture: str | None = None


@cache
def _machine() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    # All devices of a process are of one kind, so the current one speaks for them.
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"


@cache
def _units() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def compute_units(table: Mapping[str, int], default: str) -> int:
    """Compute units (streaming multiprocessors) of the current device, which may be a part of one or a smaller model of the same
    architecture. `table` gives them by architecture where no device is asked: under `record`, and where there is none."""
    if _architecture is None and torch.cuda.is_available():
        return _units()
    return table.get(architecture(), table[default])


def architecture() -> str:
    """`gfx942`, `gfx950`, `sm_90`, ..., or `cpu` (the interpreter)."""
    return _architecture or _machine()


def precision(dtype: torch.dtype) -> str:
    """`input_precision` of `tl.dot`. On NVIDIA's matrix units three tf32 products reach float32's accuracy; other devices have
    float32 matrix units."""
    return "tf32x3" if dtype == torch.float32 and architecture().startswith("sm_") else "ieee"


def pipeline(stages: int) -> int:
    """Stages of a loop's pipeline: at most two on AMD, because each stage holds another tile in 64 KiB of shared memory."""
    return min(stages, 2) if architecture().startswith("gfx") else stages


@contextmanager
def record(target: str) -> Iterator[list[Launch]]:
    """In this context host code decides as on `target` and launches nothing. Yields the list of the launches it would make."""
    global _recording, _architecture
    before = _recording, _architecture
    launches: list[Launch] = []
    _recording, _architecture = launches, target
    try:
        yield launches
    finally:
        _recording, _architecture = before


def launch(
    kernel: Any, grid: tuple[int, ...], *, warps: int = 4, stages: int = 1, dot_rows: int = 0,
    options: Mapping[str, int] | None = None, **arguments: Any,
) -> None:  # fmt: skip
    """Launch `kernel` over `grid`; the arguments are the kernel's own, by name. An empty grid launches nothing.

    Args:
        options: of the compiler of `architecture()`; other compilers refuse options that they do not know.
    """
    if not all(grid):
        return
    if _recording is not None:
        _recording.append(Launch(kernel, grid, arguments, warps, stages, dot_rows, options or {}))
        return
    with _on_device_of(arguments):
        kernel[grid](**arguments, num_warps=warps, num_stages=stages, **(options or {}))


def _on_device_of(arguments: dict[str, Any]) -> AbstractContextManager[object]:
    """Makes the tensors' device current where it is not: Triton launches on the current device, wherever the tensors lie."""
    device = next(each.device for each in arguments.values() if isinstance(each, torch.Tensor))
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
