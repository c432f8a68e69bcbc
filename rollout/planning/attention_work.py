"""Paged attention as the kernels share it out: programs, splits, bytes of partial results, and what these cost.

How it is counted: `kernels/attention/splits.py` deals the keys of the batch on the host; the same code deals them here, for
another device. From the items follow the waves of programs, the key blocks of the longest item, and the partial results, which
are written once and read once. Seconds of a layer, its launches apart, are the longest of

    bytes / attention's bandwidth,   FLOPs / (attention's FLOP/s * busy units),   waves * (blocks + start) * block,

and behind these the partial results at the rate of copies. `block` is assumed, not measured: the latency of a load over the
blocks that a program has under way.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from ...kernels.attention.splits import START, Cut
from ...kernels.attention.tiles import choose
from ...kernels.launch import record

_LATENCY = {"gfx942": 1.0e-6, "gfx950": 1.0e-6, "sm_90": 0.8e-6}
"""Seconds from the load of a key block to the end of its products in a program that waits for nobody; assumed."""


class AttentionCall(NamedTuple):
    """Attention of one layer, in bfloat16, over sequences that have `rows` rows behind `context` cached positions each."""

    heads: int
    groups: int
    head_dim: int
    batch: int
    rows: int
    context: int

    @property
    def bytes(self) -> int:
        """Of keys and values, read once."""
        return 4 * self.groups * self.head_dim * self.batch * (self.context + self.rows)

    @property
    def flops(self) -> int:
        """Of both products."""
        return 4 * self.heads * self.head_dim * (self.context + self.rows) * self.batch * self.rows


class Shares(NamedTuple):
    """How the keys of a batch are shared out.

    Attributes:
        programs: of the launch that have work. waves: of them. busy: share of the compute units that have work, on average until
            the last one has none.
        splits: of a tile. longest: key blocks of an item. block: seconds of one.
        partial: bytes of partial results, written and read.
    """

    programs: int
    waves: int
    busy: float
    splits: int
    longest: int
    block: float
    partial: int

    def seconds(self, flops: float, moved: float, copies: float) -> float:
        """Seconds of a layer. Args: seconds of its FLOPs and of its bytes on a full device; byte/s of copies."""
        alone = self.waves * (self.longest + START) * self.block
        return max(flops / self.busy, moved, alone) + self.partial / copies


@lru_cache(maxsize=4096)
def shares(arch: str, call: AttentionCall) -> Shares:
    """How the kernels of an architecture share a call out."""
    heads, groups, head_dim, batch, rows, context = call
    with record(arch):
        tile = choose(arch, torch.bfloat16, rows, heads // groups, False)
    first_S1 = np.arange(batch + 1) * rows
    cut = Cut.of(first_S1, tile, heads, groups, False)
    line_T, past_T, zero_T = np.tile(np.arange(rows), batch), np.full(batch * rows, context), np.zeros(batch * rows, np.int64)
    range_6T = np.stack([zero_T, past_T, zero_T, line_T + 1, zero_T, zero_T])
    tile_N4, item_I8 = np.empty((len(cut.count_N), 4), np.int32), np.empty((cut.capacity(context), 8), np.int32)
    cut.deal(range_6T, np.full(batch, context), tile_N4, item_I8)
    items = item_I8[item_I8[:, 7] > 0]
    programs = len(items) * groups
    split = items[items[:, 7] > 1]
    return Shares(
        programs, waves=-(-programs // tile.programs), busy=programs / tile.units / -(-programs // tile.units),
        splits=int(tile_N4[:, 3].max()), longest=int((items[:, 6] - items[:, 5]).max()),
        block=_LATENCY[arch] / max(tile.stages - 1, 1), partial=2 * 4 * (head_dim + 1) * heads * int(split[:, 3].sum()),
    )  # fmt: skip
