"""The figures of one compiled kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .program import Instruction, Program, ahead

NARROW, WIDE = 4, 16
"""Bytes of a load: below the first a thread takes less than a register, from the second on it takes the most there is."""


@dataclass(frozen=True)
class Figures:
    """Loads, cycles, `ahead` and `loop_barriers` are those of the innermost loops with matrix instructions. Where there are none
    they are those of the innermost loops with loads or barriers, else of the whole kernel. Instructions are counted as the
    compiler wrote them, not by how often they run.

    Attributes:
        waves: waves per SIMD, on NVIDIA warps per multiprocessor, that registers and shared memory allow.
        narrow, small: shares of loads from global memory of less than 4 and of less than 16 bytes per thread.
        vector_cycles: cycles of vector instructions per cycle of matrix instructions; 0 without matrix instructions.
        ahead: matrix instructions between a load and the wait for it, mean over bytes; 0 without matrix instructions.
        exposed: share of loads that no matrix instruction parts from the wait; 0 without matrix instructions.
        loop_barriers: barriers in one pass through a loop, of the loop that has most.
        barriers: in the whole kernel.
        full_waits: waits that leave no load running, in the whole kernel.
    """

    waves: int
    narrow: float
    small: float
    vector_cycles: float
    ahead: float
    exposed: float
    loop_barriers: int
    barriers: int
    full_waits: int


MORE_IS_BETTER = ("waves", "ahead")
"""The other figures are better when they are small."""


def of(program: Program, waves: int) -> Figures:
    """Args: waves: see `Figures`."""
    whole = program.instructions
    has_matrix = any(each.kind == "matrix" for each in whole)
    bodies: list[Sequence[Instruction]] = program.innermost("matrix") if has_matrix else program.innermost("load")
    loops = bool(bodies)
    bodies = bodies or [whole]
    loads = [each.bytes for body in bodies for each in body if each.kind == "load"]
    cycles = {
        kind: sum(each.cycles for body in bodies for each in body if each.kind == kind) for kind in ("matrix", "vector")
    }
    waited = [pair for body in bodies for pair in ahead(body, loops)] if has_matrix else []
    around = bodies if loops and has_matrix else program.innermost("barrier")
    barriers = [sum(each.kind == "barrier" for each in body) for body in around]
    return Figures(
        waves=waves,
        narrow=_share(sum(count < NARROW for count in loads), len(loads)),
        small=_share(sum(count < WIDE for count in loads), len(loads)),
        vector_cycles=_share(cycles["vector"], cycles["matrix"]),
        ahead=_share(sum(count * products for count, products in waited), sum(count for count, _ in waited)),
        exposed=_share(sum(not products for _, products in waited), len(waited)),
        loop_barriers=max(barriers, default=0),
        barriers=sum(each.kind == "barrier" for each in whole),
        full_waits=sum(each.limit == 0 for each in whole),
    )


def _share(part: float, whole: float) -> float:
    return round(part / whole, 3) if whole else 0.0
