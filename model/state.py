"""SequenceState: the interface of a cache during one forward pass.

The network writes the K/V and the convolution tail of clean rows, and reads those of the tokens before them. It does not know
pages, slots or lengths. Without a cache (training, scoring) everything a row sees is in the pack.

Legend: S sequences, L positions read, G key heads, D head size, C channels of the q/k projection, H = hops, W width of the
delayed value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from ..kernels.cca import Pools


@dataclass(frozen=True)
class Paging:
    """Where the entries of the cache lie, for code that reads and writes them in place. Host tensors, of one layout.

    Attributes:
        page_size: positions per page. table_SP: page numbers of each sequence.
        tail_SH: tail entry of each of the H tokens before each start, nearest first.
        write_T, tail_T: pool position, and tail entry, that keeps each row; -1 for none.
        apart: some row may be kept in a tail entry that another one still reads.
    """

    page_size: int
    table_SP: torch.Tensor
    tail_SH: torch.Tensor
    write_T: torch.Tensor
    tail_T: torch.Tensor
    apart: bool


class SequenceState(Protocol):
    """Cached state of the S sequences of one layout, layer by layer."""

    @property
    def longest(self) -> int:
        """Cached positions of the longest sequence."""

    def read(self, layer: int, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """k_SLGD, v_SLGD of the first `positions` positions. Values past a sequence's end are finite and mean nothing."""

    def write(
        self, layer: int, k_TGD: torch.Tensor, v_TGD: torch.Tensor, x_TC: torch.Tensor, delayed_TW: torch.Tensor
    ) -> None:
        """Keep the clean rows of the pack at their positions; mask rows are ignored."""

    def paging(self) -> Paging:
        """Where the rows of this layout lie."""

    def pools(self, layer: int) -> Pools:
        """The tensors that `paging` gives places in."""

    def all_pools(self) -> Pools:
        """Those of all layers, each with the layers in front; the same object at every call."""
