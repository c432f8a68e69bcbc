"""Which rows of a pack see which, tile by tile.

    sees(i, j) = same sequence and (position_j <= limit_i and position_j > position_i - window  if j is clean
                                    else  block_j == block_i)

Invariants: a pair of tiles that is left out holds no pair of rows that see each other; a pair of tiles called whole holds
only such pairs. Nothing here grows with T * T, except one entry per pair of tiles.

Legend: T rows, N tiles, I rows of a query tile, J rows of a key tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rule:
    """What decides who sees whom.

    Attributes:
        sequence_T, position_T, limit_T: int64, sequence of each row, its position, the last clean position it sees.
        block_T: int64, mask block of each row, negative for a clean row.
        window: clean positions a row looks back, itself included; None for all.
    """

    sequence_T: torch.Tensor
    position_T: torch.Tensor
    limit_T: torch.Tensor
    block_T: torch.Tensor
    window: int | None = None

    @property
    def rows(self) -> int:
        """T."""
        return self.sequence_T.shape[0]

    def sees(self, i: torch.Tensor | slice, j: torch.Tensor | slice) -> torch.Tensor:
        """bool: whether rows i see rows j. Slices give [I, J]; index tensors are taken pair by pair."""
        place = (slice(None), None) if isinstance(i, slice) else ...
        position, block = self.position_T[i][place], self.block_T[i][place]
        clean = self.position_T[j] <= self.limit_T[i][place]
        if self.window is not None:
            clean = clean & (self.position_T[j] > position - self.window)
        same = self.sequence_T[j] == self.sequence_T[i][place]
        return same & torch.where(self.block_T[j] < 0, clean, self.block_T[j] == block)

    def tiles(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """bool[N, N] twice: pairs (query tile, key tile) that may hold visible pairs of rows; those that hold no other."""
        low, high = _least, _most
        sequence, sequence_end = low(self.sequence_T, size), high(self.sequence_T, size)
        clean_T = self.block_T < 0
        far = torch.iinfo(torch.int64).max // 2
        first = low(self.position_T.where(clean_T, far), size)  # of the clean rows
        last = high(self.position_T.where(clean_T, -far), size)
        block, block_end = low(self.block_T.where(~clean_T, far), size), high(self.block_T, size)
        i, j = (slice(None), None), (None, slice(None))
        some = (sequence[i] <= sequence_end[j]) & (sequence[j] <= sequence_end[i])
        alone = (sequence == sequence_end)[i] & (sequence == sequence_end)[j] & (sequence[i] == sequence[j])
        clean = first[j] <= high(self.limit_T, size)[i]
        whole = alone & (block_end < 0)[j] & (last[j] <= low(self.limit_T, size)[i])
        if self.window is not None:
            clean &= last[j] > low(self.position_T, size)[i] - self.window
            whole &= first[j] > high(self.position_T, size)[i] - self.window
        return some & (clean | (block[i] <= block_end[j]) & (block[j] <= block_end[i])), whole


def _padded(x_T: torch.Tensor, size: int) -> torch.Tensor:
    """[N, size]; the last tile is filled up with its last row."""
    missing = -len(x_T) % size
    return torch.cat([x_T, x_T[-1:].expand(missing)]).view(-1, size)


def _least(x_T: torch.Tensor, size: int) -> torch.Tensor:
    return _padded(x_T, size).amin(1)


def _most(x_T: torch.Tensor, size: int) -> torch.Tensor:
    return _padded(x_T, size).amax(1)
