"""What the network asks of a cache during one forward pass.

The network writes the K/V and the convolution tail of clean rows and reads what came before them. It does not know pages,
slots or lengths. Without a cache (training, scoring) everything a row sees is in the pack.

Legend: S sequences, L cached positions of the longest one, G key heads, D head size, C channels of the q/k projection,
N = S * hops tail entries, W width of the delayed value.
"""

from __future__ import annotations

from typing import Protocol

import torch


class SequenceState(Protocol):
    """Cached state of the S sequences of one layout, layer by layer."""

    @property
    def longest(self) -> int:
        """L: cached positions of the longest sequence; `read` pads to it."""

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """k_SLGD, v_SLGD of positions 0..L-1; entries at or past a sequence's start are never attended to."""

    def read_tail(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """x_SHC, delayed_SW: q/k projections of the hops tokens before each start, nearest first, and the delayed value
        of the nearest one. Entries before the document are never used."""

    def write(
        self, layer: int, k_TGD: torch.Tensor, v_TGD: torch.Tensor, x_TC: torch.Tensor, delayed_TW: torch.Tensor
    ) -> None:
        """Keep the clean rows of the pack at their positions; mask rows are ignored."""
