"""Attention over a long pack of rows through torch's FlexAttention: one fused kernel that reads the ranges itself.

Same result as `blockwise`. The table of tiles is ours: torch would make one by evaluating all T * T pairs.
Source: FlexAttention, arXiv 2412.05496. Legend: T rows, H query heads, G key heads, D head size, N tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .ranges import RowRanges

TILE = 128
"""Rows of a tile, as the kernel wants them."""


def block_mask(ranges: RowRanges) -> BlockMask:
    """The kernel's table of tiles."""
    some_NN, whole_NN = ranges.tiles(TILE)
    partial, whole = _table(some_NN & ~whole_NN), _table(whole_NN)
    narrow = RowRanges(ranges.range_4T.to(torch.int32))

    def sees(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return narrow.sees(i, j)

    return BlockMask.from_kv_blocks(*partial, *whole, BLOCK_SIZE=TILE, mask_mod=sees, seq_lengths=(ranges.rows, ranges.rows))


def attend_flex(
    q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor, mask: BlockMask, scale: float
) -> torch.Tensor:
    """Returns out_THD. Compiled on accelerators; elsewhere all scores exist at once, so only for tests."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_TGD, v_TGD))
    kernel: Any = flex_attention if q_THD.device.type == "cpu" else _compiled()
    out = kernel(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


def _table(seen_NN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many key tiles each query tile has, and which, int32[1, 1, N] and [1, 1, N, N]."""
    count_N = seen_NN.sum(1, dtype=torch.int32)
    order_NN = seen_NN.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return count_N[None, None], order_NN[None, None]


@cache
def _compiled() -> Callable[..., Any]:
    # The first length gets a kernel of its own, a second one makes a kernel for all lengths.
    return torch.compile(flex_attention)
