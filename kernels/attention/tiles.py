"""Sizes of the attention kernel's tiles, by device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..launch import architecture, compute_units, pipeline


@dataclass(frozen=True)
class Tile:
    """A tile of m query rows (rows of a sequence times query heads of a key head) against n keys at a time.

    Attributes:
        warps, stages: of the launch.
        units: compute units of the device.
        held: programs that a compute unit has registers and shared memory for.
        matrix: rows of a matrix instruction on AMD; 0 leaves them to the compiler.
    """

    m: int
    n: int
    warps: int
    stages: int
    units: int
    held: int
    matrix: int = 0

    @property
    def programs(self) -> int:
        """Programs that fill the device."""
        return self.units * self.held

    @property
    def options(self) -> dict[str, int]:
        """Of Triton's compiler for AMD."""
        return {"matrix_instr_nonkdim": self.matrix} if self.matrix else {}


_AMD = {16: (64, 4, 2, 0), 64: (32, 4, 2, 16), 128: (32, 4, 2, 0), 256: (32, 8, 1, 0)}
_SIZES = {  # m: (n, warps, held, matrix) in 16 bits
    "gfx942": _AMD,
    "gfx950": _AMD,
    "sm_90": {16: (64, 4, 3, 0), 64: (64, 4, 2, 0), 128: (64, 8, 1, 0)},
}
_WIDE = {16: (32, 4, 2, 0), 64: (32, 4, 1, 0)}  # in 32 bits
_UNITS = {"gfx942": 304, "gfx950": 256, "sm_90": 132}
"""Compute units of MI300X, MI355X and H200."""
_STAGES = 3
INVARIANT_QUERIES = 64
"""m under `batch_invariant`."""
MOST_GROUP = 64
"""Query heads of a key head: a tile holds those of one row at least, and every device and precision has a tile of so many."""
MOST_QUERIES = max(m * sizes[m][2] * _UNITS[arch] for arch, sizes in _SIZES.items() for m in sizes)
"""Query rows of the programs that fill the largest device."""


def choose(arch: str, dtype: torch.dtype, rows: int, group: int, batch_invariant: bool) -> Tile:
    """The tile for sequences of `rows` rows. Args: group, query heads of a key head, at most `MOST_GROUP`."""
    assert group <= MOST_GROUP, "the backend refuses such a policy"
    sizes = _SIZES.get(arch, _SIZES["sm_90"]) if dtype.itemsize == 2 else _WIDE

    def cost(m: int) -> tuple[int, int]:
        count = -(-rows // (m // group))
        # Every tile of a sequence reads its keys again, mostly from the cache of the device: 0.15 of the first reading. Of equals
        # the fewest tiles are as many products and less of all else: 17 to 20 rows of 4 heads take one of 128, not five of 16.
        return count * m * (100 + 15 * (count - 1)), count

    m = INVARIANT_QUERIES if batch_invariant else min((m for m in sizes if m >= group), key=cost)
    n, warps, held, matrix = sizes[m]
    stages = pipeline(_STAGES) if dtype.itemsize == 2 else 2
    matrix = matrix if architecture().startswith("gfx") else 0
    return Tile(m, n, warps, stages, compute_units(_UNITS, "sm_90"), held, matrix)
