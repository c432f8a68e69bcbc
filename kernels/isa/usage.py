"""What a compiled kernel uses of a device: registers, spills, stack, matrix instructions, and its figures."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import amdgcn, figures, sass
from .figures import Figures


@dataclass(frozen=True)
class Usage:
    """registers: vector registers of a thread. spills: of them spilled. stack: bytes per thread. dots: matrix instructions."""

    registers: int
    spills: int
    stack: int
    dots: int
    figures: Figures


def usage(asm: Mapping[str, Any], target: str, warps: int, shared: int, device_shared: int, wgmma: bool) -> Usage:
    """Reads what the compiler left.

    Args:
        asm: of Triton's compiled kernel. target: a key of `TARGETS`.
        warps, shared: of a program; shared memory in bytes. device_shared: bytes of a compute unit (AMD).
        wgmma: on NVIDIA, count products of warp groups, else of warps.
    """
    if target.startswith("gfx"):
        return _amd(asm["amdgcn"], target, warps, shared, device_shared)
    text, registers, stack = _disassembled(asm["cubin"])
    program = sass.parse(text, target)
    instruction = "wgmma.mma_async" if wgmma else "mma"
    # ptxas spills to the stack.
    dots = len(re.findall(rf"\b{instruction}\S*\.sync", asm["ptx"]))
    return Usage(registers, 0, stack, dots, figures.of(program, sass.warps(registers, warps, shared)))


def _amd(text: str, target: str, warps: int, shared: int, lds: int) -> Usage:
    registers, spills, stack = (
        int(found.group(1)) if (found := re.search(rf"\.{name}:\s+(\d+)", text)) else 0
        for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    )
    program = amdgcn.parse(text, target)
    dots = sum(each.kind == "matrix" for each in program.instructions)
    return Usage(registers, spills, stack, dots, figures.of(program, amdgcn.waves(registers, warps, shared, lds)))


def _disassembled(cubin: bytes) -> tuple[str, int, int]:
    """(assembly, registers, bytes of stack per thread), by the nvdisasm and cuobjdump of the Triton wheel."""
    from triton import knobs

    def run(*command: str) -> str:
        return subprocess.run([*command, file.name], check=True, capture_output=True, text=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = run(knobs.nvidia.nvdisasm.path, "-c")
        resources = run(knobs.nvidia.cuobjdump.path, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", resources)
    assert found is not None, resources
    return text, int(found.group(1)), int(found.group(2))
