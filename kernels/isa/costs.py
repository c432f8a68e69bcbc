"""Cycles per instruction: of a matrix instruction by its FLOPs, of a vector instruction by its name.

Sources: peak rates of the data sheets of MI300X (1,307 TFLOP/s in 16 bits and 163 in 32, 304 compute units of 4 SIMDs, 2.1 GHz),
MI355X (2,517 and 157, 256 units, 2.4 GHz) and H200 (989 and, in TF32, 495; 132 multiprocessors of 4 partitions, 1.83 GHz). On AMD
they give the passes of 4 cycles of LLVM's SISchedule.td (v_mfma_f32_32x32x8 of bfloat16 on gfx942, and 32x32x16 on gfx950: 8
passes), whose vector instructions take 1 pass, transcendental ones and 32-bit integer products 4. On NVIDIA the "throughput of
native arithmetic instructions" of the CUDA C++ programming guide, compute capability 9.0.
"""

from __future__ import annotations

import re

_MATRIX_RATE = {  # FLOPs per cycle of a SIMD or partition, by bits of an input
    "gfx942": {16: 512, 32: 64},
    "gfx950": {16: 1024, 32: 64},
    "sm_90": {16: 1024, 32: 512},
}


def matrix_cycles(target: str, m: int, n: int, k: int, bits: int) -> float:
    """Cycles that a product of m x n x k keeps the matrix unit of one SIMD or partition busy."""
    return 2 * m * n * k / _MATRIX_RATE[target][bits]


_AMD_PASS = 4
_AMD_QUARTER_RATE = re.compile(
    r"v_(?:exp|log|rcp|rcp_iflag|rsq|sqrt|sin|cos)_f(?:16|32|64)|v_mul_(?:lo|hi)_[iu]32|v_mad_[iu]64_[iu]32"
)


def amd_vector_cycles(name: str) -> float:
    """Of an instruction whose name begins with `v_`."""
    return 4 * _AMD_PASS if _AMD_QUARTER_RATE.match(name) else _AMD_PASS


_NVIDIA_CYCLES = {  # of 32 threads; the guide gives threads per cycle of a multiprocessor, four partitions
    **dict.fromkeys(("FADD", "FMUL", "FFMA", "HADD2", "HMUL2", "HFMA2"), 1.0),
    **dict.fromkeys(("MUFU", "I2F", "F2I", "F2F", "POPC", "FLO", "BREV", "REDUX"), 8.0),
    "SHFL": 4.0,
}
_NVIDIA_OTHER = 2.0
"""64 threads per cycle: integers, comparisons, selections, moves, packed conversions, float64."""


def nvidia_vector_cycles(name: str) -> float:
    """Args: name: the opcode up to its first point."""
    return _NVIDIA_CYCLES.get(name, _NVIDIA_OTHER)
