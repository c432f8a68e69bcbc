"""Rows: which keys each row of a pack over a paged cache attends to, and how the rows are cut into tiles.

Invariants:
- A row sees three ranges: cached positions, clean rows of the pack, and rows of its own mask block.
- Built on the host and moved once; nothing is read back. All tensors are int32, of sizes that depend only on
  (T, S, pages per sequence, tiles), so that a captured step can find new values in the place of old ones.

Legend: T rows, S sequences, P pages of the longest sequence, N tiles, I items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..launch import architecture
from .splits import Cut
from .tiles import choose


@dataclass(frozen=True)
class Rows:
    """One pack over one paged cache, for the layers of one sliding window.

    Attributes:
        range_6T: begin and end of the cached positions, of the clean rows and of the block's rows that a row sees; rows
            are counted from the sequence's first.
        first_S1: first pack row of each sequence, and T.
        start_S: cached positions of each sequence.
        table_SP: page numbers of each sequence.
        tile_N4: of each tile, its first row in the pack, its rows, its first item and the number of its items.
        item_I8: of each item, what its program needs to begin: the tile's sequence, the sequence's first row, the tile's first
            row (counted from that one), its rows, the key blocks of the cache, begin and end of the item's key blocks, and the
            number of the tile's items; 0 of them for an idle item.
        cut: how the rows are cut into tiles.
        page_size: positions per page.
    """

    range_6T: torch.Tensor
    first_S1: torch.Tensor
    start_S: torch.Tensor
    table_SP: torch.Tensor
    tile_N4: torch.Tensor
    item_I8: torch.Tensor
    cut: Cut
    page_size: int

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
        counts = np.diff(first_S1)
        tile = choose(architecture(), dtype, int(counts.max(initial=1)), heads // kv_heads, batch_invariant)
        cut = Cut.of(first_S1, tile, heads, kv_heads, batch_invariant)
        range_6T = apart(range_4T, np.repeat(start_S, counts)).astype(np.int32)
        tile_N4 = np.empty((len(cut.count_N), 4), np.int32)
        item_I8 = np.empty((cut.capacity(table_SP.shape[1] * page_size), 8), np.int32)
        cut.deal(range_6T, start_S, tile_N4, item_I8)

        def move(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32)).to(device)

        return cls(
            range_6T=move(range_6T), first_S1=move(first_S1), start_S=move(start_S),
            table_SP=table_SP.to(torch.int32).to(device), tile_N4=move(tile_N4), item_I8=move(item_I8), cut=cut,
            page_size=page_size,
        )  # fmt: skip

    def deal(self, fresh_2N: np.ndarray | None = None) -> None:
        """Write tiles and items for the ranges and starts as they are now, in place, on the host. Args: of `Cut.deal`."""
        self.cut.deal(
            self.range_6T.numpy(), self.start_S.numpy(), self.tile_N4.numpy(), self.item_I8.numpy(), fresh_2N
        )


def apart(range_4T: np.ndarray, start_T: np.ndarray) -> np.ndarray:
    """The `range_6T` of ranges of keys: cached keys and keys of the pack apart, the latter counted from the sequence's first row.

    Args:
        range_4T: as in `Rows.of`. start_T: cached positions of each row's sequence.
    """
    clean_2T = range_4T[:2]
    block_2T = np.maximum(range_4T[2:] - start_T, 0)  # a clean row's is 0 and 0
    return np.concatenate([np.minimum(clean_2T, start_T), np.maximum(clean_2T - start_T, 0), block_2T])
