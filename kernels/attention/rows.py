"""Which keys each row of a pack attends to, as integer ranges, and how the rows are cut into tiles.

Invariants:
- Within a sequence the clean rows come first, in the order of their positions, and the rows of a mask block are
  contiguous; so what a row sees is three ranges: cached positions, clean rows, and rows of its own block.
- Built on the host from what the host knows, and moved once; nothing is read back. All tensors are int32, of sizes that
  depend only on (T, S, pages per sequence, tiles): a captured step finds new values in the place of old ones.

Legend: T rows, S sequences, P pages of the longest sequence, N tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..launch import architecture
from .tiles import Tile, choose

CLEAN = -1
"""In `block_T`: a row that belongs to no mask block."""


@dataclass(frozen=True)
class Rows:
    """One pack over one paged cache, for the layers of one sliding window.

    Attributes:
        range_6T: begin and end of the cached positions, of the clean rows and of the block's rows that a row sees; rows
            are counted from the sequence's first.
        first_S1: first pack row of each sequence, and T.
        start_S: cached positions of each sequence.
        table_SP: page numbers of each sequence.
        tile_N2: sequence and first row (counted from the sequence's first) of each tile.
        tile: the tile's sizes.
        page_size: positions per page.
        splits: programs that share a tile's keys.
        per_split: key blocks of each of them, where that is fixed (`batch_invariant`); 0 where they share evenly.
    """

    range_6T: torch.Tensor
    first_S1: torch.Tensor
    start_S: torch.Tensor
    table_SP: torch.Tensor
    tile_N2: torch.Tensor
    tile: Tile
    page_size: int
    splits: int
    per_split: int

    @classmethod
    def of(
        cls,
        sequence_T: torch.Tensor,
        position_T: torch.Tensor,
        limit_T: torch.Tensor,
        block_T: torch.Tensor,
        start_S: torch.Tensor,
        table_SP: torch.Tensor,
        *,
        page_size: int,
        heads: int,
        kv_heads: int,
        dtype: torch.dtype,
        window: int | None = None,
        batch_invariant: bool = False,
        device: torch.device | str = "cpu",
    ) -> Rows:
        """Build it from host tensors (the fields of the layout of the same names).

        Args:
            table_SP: page numbers; entries past a sequence's pages are never read.
            window: sliding window over clean keys; None sees everything.
            batch_invariant: tile sizes and the cut of the keys do not depend on what else is in the pack.
            device: where the kernels run.
        """
        sequence, position, limit, block, start = (
            x.numpy().astype(np.int64) for x in (sequence_T, position_T, limit_T, block_T, start_S)
        )
        sequences, rows = len(start), len(sequence)
        first = np.searchsorted(sequence, np.arange(sequences + 1))
        start_T, first_T = start[sequence], first[:-1][sequence]

        past_end = np.minimum(start_T, limit + 1)
        past_begin = np.zeros(rows, dtype=np.int64)
        clean_begin, clean_end = np.zeros(rows, dtype=np.int64), np.maximum(limit + 1 - start_T, 0)
        clean_count = np.bincount(sequence[block == CLEAN], minlength=sequences)[sequence]
        clean_end = np.minimum(clean_end, clean_count)
        if window is not None:
            past_begin = np.clip(position - window + 1, 0, past_end)
            clean_begin = np.clip(position - window + 1 - start_T, 0, clean_end)
        line = np.arange(rows)
        opens = np.ones(rows, dtype=bool)
        opens[1:] = (block[1:] != block[:-1]) | (sequence[1:] != sequence[:-1])
        opening = line[opens]
        run = opens.cumsum() - 1
        closing = np.append(opening[1:], rows)
        masked = block != CLEAN
        block_begin = np.where(masked, opening[run] - first_T, 0)
        block_end = np.where(masked, closing[run] - first_T, 0)

        counts = np.diff(first)
        group = heads // kv_heads
        width = table_SP.shape[1] * page_size
        arch = architecture()
        tile = choose(arch, dtype, int(counts.max(initial=1)) * group, batch_invariant)
        per = tile.m // group
        each = -(-counts // per)
        tile_N2 = np.stack(
            [np.repeat(np.arange(sequences), each), (np.arange(each.sum()) - np.repeat(each.cumsum() - each, each)) * per]
        ).T
        splits, per_split = tile.split(len(tile_N2) * kv_heads, width, int(counts.max(initial=1)), batch_invariant)

        def move(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32)).to(device)

        return cls(
            range_6T=move(np.stack([past_begin, past_end, clean_begin, clean_end, block_begin, block_end])),
            first_S1=move(first), start_S=move(start), table_SP=table_SP.to(torch.int32).to(device),
            tile_N2=move(tile_N2), tile=tile, page_size=page_size, splits=splits, per_split=per_split,
        )  # fmt: skip
