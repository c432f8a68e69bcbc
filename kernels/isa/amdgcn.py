"""Reads AMD's assembly (`amdgcn` of a compiled kernel), and how many waves its registers and LDS allow."""

from __future__ import annotations

import re
from functools import partial

from .costs import amd_vector_cycles, matrix_cycles
from .program import Instruction, Program

_LINE = re.compile(r"\t(?P<name>[a-z]\w+)(?: (?P<operands>[^;]*))?")
_LABEL = re.compile(r"(\.LBB\w+):")
_MATRIX = re.compile(r"v_mfma_f32_(\d+)x(\d+)x(\d+)_?(?:(\d+)b_)?(bf16|f16|f32|xf32)")
_LOAD = re.compile(r"(?:buffer|global|flat)_load_(?:lds_)?(ubyte|sbyte|ushort|sshort|short|dwordx2|dwordx3|dwordx4|dword)")
_BYTES = {"ubyte": 1, "sbyte": 1, "ushort": 2, "sshort": 2, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
_WRITE = re.compile(r"(?:buffer|global|flat)_(?:store|atomic)_")
_WAIT = re.compile(r"vmcnt\((\d+)\)")


def parse(text: str, target: str) -> Program:
    """Args: target: `gfx942` or `gfx950`."""
    body = re.split(r"^\.Lfunc_end", text, maxsplit=1, flags=re.MULTILINE)[0]
    return Program.read(body, _LABEL, _LINE, _branch, partial(_instruction, target=target))


def _branch(name: str, operands: str) -> str | None:
    return operands.strip() if name == "s_branch" or name.startswith("s_cbranch_") else None


def _instruction(name: str, operands: str, target: str) -> Instruction:
    if found := _MATRIX.match(name):
        m, n, k, blocks = (int(each or 1) for each in found.groups()[:4])
        return Instruction("matrix", matrix_cycles(target, m, n, k * blocks, 16 if found[5] in ("bf16", "f16") else 32))
    if name.startswith("v_"):
        return Instruction("vector", amd_vector_cycles(name))
    if found := _LOAD.match(name):
        return Instruction("load", bytes=_BYTES[found[1]], commits=True)
    if _WRITE.match(name):
        return Instruction("store", commits=True)
    if name == "s_barrier":
        return Instruction("barrier")
    if name == "s_waitcnt":
        wait = _WAIT.search(operands)
        return Instruction("other", limit=None if wait is None else int(wait[1]))
    return Instruction("other")


_REGISTERS = 512
"""Of a lane, shared by the waves of a SIMD, in steps of 8. Vector and accumulation registers are one file."""
_MOST_WAVES = 8
_SIMDS = 4


def waves(registers: int, warps: int, shared: int, lds: int) -> int:
    """Waves per SIMD.

    Args:
        registers: vector registers of a thread. warps: of a program.
        shared: bytes of a program. lds: bytes of a compute unit.
    """
    by_registers = _REGISTERS // max(8, -(-registers // 8) * 8)
    programs = lds // shared if shared else _MOST_WAVES * _SIMDS
    # A program's waves go to the SIMDs in turn.
    by_lds = programs * warps // _SIMDS if programs * warps >= _SIMDS else int(programs > 0)
    whole = by_registers * _SIMDS // warps * warps // _SIMDS
    return min(_MOST_WAVES, by_lds, whole if whole else by_registers)
