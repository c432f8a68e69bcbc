"""Sizes of the attention kernel's tiles, by device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..launch import compute_units


@dataclass(frozen=True)
class Tile:
    """A tile of m query rows (rows of a sequence times query heads of a key head) against n keys at a time.

    Attributes:
        warps, stages: of the launch.
        programs: programs that fill the device.
    """

    m: int
    n: int
    warps: int
    stages: int
    programs: int

    def split(self, programs: int, cached: int, rows: int, batch_invariant: bool) -> tuple[int, int]:
        """Programs that share one tile's keys, and the key blocks of each program if that number is fixed, else 0.

        Args:
            programs: programs without a split. cached, rows: most cached positions and rows of a sequence.
        """
        blocks = -(-cached // self.n) + -(-rows // self.n)
        if batch_invariant:
            per = max(_INVARIANT_KEYS // self.n, 1)
            return -(-blocks // per), per
        # A split below four key blocks costs more in its start and in the combination than it saves.
        return max(min(self.programs // max(programs, 1), blocks // 4), 1), 0


_INVARIANT_KEYS = 1024
_SIZES = {  # m: (n, warps) in 16 bits
    "gfx942": {16: (64, 4), 64: (64, 4), 128: (32, 4), 256: (32, 8)},
    "gfx950": {16: (64, 4), 64: (64, 4), 128: (32, 4), 256: (32, 8)},
    "sm_90": {16: (64, 4), 64: (64, 4), 128: (64, 8)},
}
_WIDE = {16: (32, 4), 64: (32, 4)}  # in 32 bits
_UNITS = {"gfx942": 304, "gfx950": 256, "sm_90": 132}
"""Compute units of MI300X, MI355X and H200."""
_PROGRAMS_PER_UNIT = 2


def choose(arch: str, dtype: torch.dtype, queries: int, batch_invariant: bool) -> Tile:
    """The tile for sequences of `queries` query rows (rows times query heads per key head)."""
    sizes = _SIZES.get(arch, _SIZES["sm_90"]) if dtype.itemsize == 2 else _WIDE

    def cost(m: int) -> float:
        count = -(-queries // m)
        # Every tile of a sequence reads its keys again, mostly from the cache of the device.
        return count * m * (1 + 0.15 * (count - 1))

    m = 64 if batch_invariant else min(sizes, key=cost)
    n, warps = sizes[m]
    return Tile(m, n, warps, 2, _PROGRAMS_PER_UNIT * compute_units(_UNITS, "sm_90"))
