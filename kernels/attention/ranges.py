"""RowRanges: which rows of a pack without a cache each row sees, and which pairs of tiles have to be computed.

Invariants: a pair of tiles is left out exactly if no row of the one sees a row of the other, and is called whole only if every
row sees every row. Nothing here grows with T * T, except one entry per pair of tiles.

Legend: T rows, N tiles, I rows of a query tile, J rows of a key tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RowRanges:
    """Attributes: range_4T, integers: begin and end of the clean rows that each row sees, then of the rows of its mask block."""

    range_4T: torch.Tensor

    @property
    def rows(self) -> int:
        """T."""
        return self.range_4T.shape[1]

    def sees(self, i: torch.Tensor | slice, j: torch.Tensor | slice) -> torch.Tensor:
        """bool: whether rows i see rows j. Slices give [I, J]; index tensors are taken pair by pair."""
        place = (slice(None), None) if isinstance(i, slice) else ...
        if isinstance(j, slice):
            j = torch.arange(*j.indices(self.rows), device=self.range_4T.device)
        begin, end, block_begin, block_end = (self.range_4T[k][i][place] for k in range(4))
        return (j >= begin) & (j < end) | (j >= block_begin) & (j < block_end)

    def tiles(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """bool[N, N] twice, over (query tile, key tile): some row sees some key, and every row sees every key."""
        rows, device = self.rows, self.range_4T.device
        count, line = -(-rows // size), torch.arange(self.rows, device=self.range_4T.device)
        # How many rows of a query tile see something, and all, of each key tile: steps up and down, summed along the key tiles.
        some, whole = torch.zeros(2, count * (count + 1), dtype=torch.int32, device=device)
        one = torch.ones_like(line, dtype=torch.int32)
        for begin, end in (self.range_4T[:2].long(), self.range_4T[2:].long()):
            covered = torch.where(end == rows, count, end // size)  # the last tile may be shorter
            for steps, first, last in ((some, begin // size, -(-end // size)), (whole, -(-begin // size), covered)):
                seen = (end > begin) & (last > first)
                place = line[seen] // size * (count + 1)
                steps.index_add_(0, place + first[seen], one[seen])
                steps.index_add_(0, place + last[seen], -one[seen])
        length = torch.bincount(line // size)[:, None]
        some, whole = (steps.view(count, count + 1).cumsum(1)[:, :count] for steps in (some, whole))
        return some > 0, whole == length
