"""LongPack: a long pack cut into tiles once, for every layer, in the form that the device takes.

Legend: T rows, H query heads, G key heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .blockwise import Tiles, attend_blockwise
from .ranges import RowRanges

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class LongPack:
    """Attributes: tiles, the table of tiles: `Tiles` on a CPU, a `BlockMask` on an accelerator."""

    tiles: Tiles | BlockMask

    @classmethod
    def of(cls, ranges: RowRanges) -> LongPack:
        """Cut a pack into tiles."""
        if ranges.range_4T.device.type == "cuda":
            # FlexAttention takes a second to import, and decoding on a CPU does not use it.
            from .flex import block_mask

            return cls(block_mask(ranges))
        return cls(Tiles.of(ranges))

    def attend(self, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor, scale: float) -> torch.Tensor:
        """out_THD; every row must see at least one row."""
        if isinstance(self.tiles, Tiles):
            return attend_blockwise(q_THD, k_TGD, v_TGD, self.tiles, scale)
        from .flex import attend_flex

        return attend_flex(q_THD, k_TGD, v_TGD, self.tiles, scale)
