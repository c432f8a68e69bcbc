"""Rows: which keys each row of a pack over a paged cache attends to, and how the rows are cut into tiles.

Invariants:
- A row sees three ranges: cached positions, clean rows of the pack, and rows of its own mask block.
- Built on the host and moved once; nothing is read back. All tensors are int32, of sizes that depend only on
  (T, S, pages per sequence, tiles), so that a captured step can find new values in the place of old ones.

Legend: T rows, S sequences, P pages of the longest sequence, N tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..launch import architecture
from .tiles import Tile, choose


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
        range_4T: np.ndarray,
        first_S1: np.ndarray,
        start_S: np.ndarray,
        table_SP: torch.Tensor,
        *,
        page_size: int,
        heads: int,
        kv_heads: int,
        dtype: torch.dtype,
        batch_invariant: bool = False,
        device: torch.device | str = "cpu",
    ) -> Rows:
        """Build it from what the host knows.

        Args:
            range_4T: begin and end of the clean keys that each row sees, then of the keys of its mask block. The keys of a
                sequence are its cached positions, then its rows.
            table_SP: page numbers; entries past a sequence's pages are never read.
            batch_invariant: tile sizes and the cut of the keys do not depend on what else is in the pack.
            device: where the kernels run.
        """
        first, start = first_S1, start_S
        sequences = len(start)
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
            range_6T=move(apart(range_4T, np.repeat(start, counts))),
            first_S1=move(first), start_S=move(start), table_SP=table_SP.to(torch.int32).to(device),
            tile_N2=move(tile_N2), tile=tile, page_size=page_size, splits=splits, per_split=per_split,
        )  # fmt: skip


def apart(range_4T: np.ndarray, start_T: np.ndarray) -> np.ndarray:
    """The `range_6T` of ranges of keys: cached keys and keys of the pack apart, the latter counted from the sequence's first row.

    Args:
        range_4T: as in `Rows.of`. start_T: cached positions of each row's sequence.
    """
    clean_2T = range_4T[:2]
    block_2T = np.maximum(range_4T[2:] - start_T, 0)  # a clean row's is 0 and 0
    return np.concatenate([np.minimum(clean_2T, start_T), np.maximum(clean_2T - start_T, 0), block_2T])
