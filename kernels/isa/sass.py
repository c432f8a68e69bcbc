"""Reads NVIDIA's assembly (SASS, as the nvdisasm of the Triton wheel prints a cubin), and how many warps fit a multiprocessor."""

from __future__ import annotations

import re
from functools import partial

from .costs import matrix_cycles, nvidia_vector_cycles
from .program import Instruction, Program

_LINE = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*(?P<name>[A-Z][\w.]*)(?P<operands>[^;]*);")
_LABEL = re.compile(r"(\.L_\w+):")
_MATRIX = re.compile(
    r"HMMA\.(?P<warp>\d+)\.F(?:32|16)(?P<tf32>\.TF32)?"
    r"|HGMMA\.(?P<m>\d+)x(?P<n>\d+)x(?P<k>\d+)\.F(?:32|16)(?P<tf>\.TF32)?"
)
_SHAPES = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}
_WIDTH = re.compile(r"\.(U8|S8|U16|S16|64|128)\b")
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
_REGISTER = re.compile(r"(?<![A-Z])R(\d+)")
_OTHER = re.compile(
    r"(?:U[A-Z]|LD|ST|ATOM|RED|BAR|BRA|BRX|BSSY|BSYNC|BREAK|EXIT|RET|CALL|NOP|S2|CS2R|R2UR|WARP|DEPBAR|ERRBAR|MEMBAR|FENCE|CCTL|"
    r"VOTE|YIELD|NANOSLEEP|SYNCS|ELECT|ACQBULK|PLOP|R2P|P2R)"
)


def parse(text: str, target: str) -> Program:
    """Args: target: `sm_90`."""
    return Program.read(text, _LABEL, _LINE, _branch, partial(_instruction, target=target))


def _branch(name: str, operands: str) -> str | None:
    return operands.rpartition("(")[2].rstrip(") ") if name.startswith("BRA") else None


def _registers(text: str, count: int) -> frozenset[int]:
    found = _REGISTER.search(text)
    return frozenset(range(int(found[1]), int(found[1]) + count)) if found else frozenset()


def _instruction(name: str, operands: str, target: str) -> Instruction:
    head = name.partition(".")[0]
    first, _, rest = operands.partition(",")
    reads = frozenset(int(each) for each in _REGISTER.findall(rest))
    if found := _MATRIX.match(name):
        warp = found["warp"]
        # Four warps, one in each partition, share the product of a warp group.
        m, n, k = _SHAPES[warp] if warp else (int(found["m"]) // 4, int(found["n"]), int(found["k"]))
        bits = 32 if found["tf32"] or found["tf"] else 16
        return Instruction("matrix", matrix_cycles(target, m, n, k, bits), reads=reads)
    if head in ("LDG", "LDGSTS"):
        width = _WIDTH.search(name)
        count = _BYTES[width[1]] if width else 4
        if head == "LDGSTS":
            return Instruction("load", bytes=count)
        return Instruction("load", bytes=count, writes=_registers(first, -(-count // 4)), reads=reads)
    if head in ("STG", "ATOMG", "RED"):
        return Instruction("store", reads=reads)
    if head == "LDGDEPBAR":
        return Instruction("other", commits=True)
    if head == "DEPBAR":
        limit = re.search(r"SB\d+,\s*(0x[0-9a-f]+)", operands)
        return Instruction("other", limit=int(limit[1], 16) if limit else None)
    if name.startswith("BAR.SYNC") or name.startswith("BAR.RED"):
        return Instruction("barrier")
    if _OTHER.match(head):
        # A store to shared memory names what it reads behind its address.
        return Instruction("other", reads=reads)
    return Instruction("vector", nvidia_vector_cycles(head), reads=reads)


_REGISTERS, _REGISTER_UNIT = 65536, 256
_MOST_WARPS, _MOST_PROGRAMS = 64, 32
_SHARED, _SHARED_OF_A_PROGRAM = 233472, 1024
"""Bytes of a multiprocessor of compute capability 9.0, and what the system keeps for each program."""


def warps(registers: int, warps: int, shared: int) -> int:
    """Warps per multiprocessor. Args: registers of a thread, warps and bytes of shared memory of a program."""
    unit = -(-max(registers, 1) * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    programs = min(
        _REGISTERS // unit // warps, _SHARED // (shared + _SHARED_OF_A_PROGRAM), _MOST_WARPS // warps, _MOST_PROGRAMS
    )
    return programs * warps
