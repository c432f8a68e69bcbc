"""Which program computes which keys (split-KV, arXiv 2311.01282): chosen on the host, from the keys that each tile really sees.

A program takes one item, which is a tile and a range of its key blocks. Items are about equally long, whatever the sequences are,
so their number grows with the keys of all sequences together.

Invariants:
- Key blocks are counted from position 0: cached position p lies in block p // n, row r of a sequence in block
  ceil(start / n) + r // n.
- A tile has 1 to MOST_SPLITS items, one after another in the table and in the order of the keys.
- There are at most `Cut.capacity` items. That number follows from shapes alone, so a captured step has a grid of that size; items
  past the last one are idle.
- With `batch_invariant` the items of a tile follow from its own sequence alone.

Legend: T rows, S sequences, N tiles, I items, C candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .tiles import Tile

MOST_SPLITS = 32
"""`combine` reads all partial results of a row at once, in one block of this many."""
_LEAST_BLOCKS = 4
"""Key blocks of an item where a tile is split; shorter items take longer to start than to compute."""
START = 3
"""What the start of a program takes, in key blocks: three loads, one behind another, and the first keys."""
_UNDER_WAY, _BALANCED = 14000, 150
"""Keys of a key head that must be under way for the device to read at its full rate: twice its bandwidth times the latency of a
load (at 512 bytes a key and a value 7200 on MI300X and 6400 on H200), because the latency grows with the load. And the query rows
of a tile whose products take as long as its keys on a full device: 148 and 162. Both are counted at the rates and latencies that
`rollout/planning` assumes."""
WAVES = 2
"""Waves of whole tiles up to which tiles are split; where there are more, the device is busy with them."""
INVARIANT_KEYS = 1024
"""Fewest keys of an item under `batch_invariant`, if the tile has more than one."""
_FAR = np.int64(2**31 - 1)


@dataclass(frozen=True)
class Cut:
    """The rows of a pack, cut into tiles, on the host.

    Attributes:
        tile: sizes of a tile. groups: key heads; an item has a program for each.
        batch_invariant: the items of a tile follow from its own sequence.
        sequence_N, first_N, opening_N, count_N: sequence of each tile, that sequence's first row in the pack, the tile's first
            row (counted from that one), and its rows.
        rows_N: rows of its sequence.
    """

    tile: Tile
    groups: int
    batch_invariant: bool
    sequence_N: np.ndarray
    first_N: np.ndarray
    opening_N: np.ndarray
    count_N: np.ndarray
    rows_N: np.ndarray

    @classmethod
    def of(cls, first_S1: np.ndarray, tile: Tile, heads: int, groups: int, batch_invariant: bool) -> Cut:
        """Args: first_S1, first pack row of each sequence, and T; heads, query heads."""
        counts, per = np.diff(first_S1), tile.m // (heads // groups)
        each = -(-counts // per)
        sequence_N = np.repeat(np.arange(len(counts)), each)
        opening_N = (np.arange(len(sequence_N)) - np.repeat(np.cumsum(each) - each, each)) * per
        rows_N = counts[sequence_N]
        count_N = np.minimum(rows_N - opening_N, per)
        return cls(tile, groups, batch_invariant, sequence_N, first_S1[sequence_N], opening_N, count_N, rows_N)

    def capacity(self, cached: int) -> int:
        """Most items where no sequence has more than `cached` cached positions."""
        tile, tiles = self.tile, len(self.sequence_N)
        blocks = -(-cached // tile.n) + -(-int(self.rows_N.max(initial=1)) // tile.n)
        if self.batch_invariant:
            return tiles * min(-(-blocks // self._least), MOST_SPLITS)
        if tiles * self.groups > WAVES * tile.programs:
            return tiles
        # Items that fill the device, and of each tile one that is shorter than the others.
        splits = min(max(blocks // _LEAST_BLOCKS, 1), MOST_SPLITS)
        return min(tiles * splits, tiles + tile.programs // self.groups)

    @property
    def _least(self) -> int:
        """Key blocks of an item under `batch_invariant`, of a sequence that needs no longer ones."""
        return max(INVARIANT_KEYS // self.tile.n, 1)

    @cached_property
    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        """The columns of both tables that no position changes: row_N2 of `tile_N4`, and line_N8 with those of `item_I8`."""
        row_N2 = np.stack([self.first_N + self.opening_N, self.count_N], 1).astype(np.int32)
        line_N8 = np.zeros((len(row_N2), 8), np.int32)
        for column, of_N in enumerate((self.sequence_N, self.first_N, self.opening_N, self.count_N)):
            line_N8[:, column] = of_N
        return row_N2, line_N8

    def fresh_blocks(self, range_6T: np.ndarray) -> np.ndarray:
        """Begin and end, [2, N], of the key blocks of the pack that each tile sees, from the first row of its sequence."""
        ranges_6T = range_6T.copy()
        ranges_6T[:2] = 0
        row_N = self._rows[0][:, 0]
        return np.stack(key_blocks(ranges_6T, row_N, 0 * row_N, self.tile.n))

    def deal(
        self, range_6T: np.ndarray, start_S: np.ndarray, tile_N4: np.ndarray, item_I8: np.ndarray,
        fresh_2N: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Write the tables of tiles and items for these positions.

        Args:
            range_6T: as of `Rows`. start_S: cached positions of each sequence. item_I8: as long as the `capacity`.
            fresh_2N: the `fresh_blocks`, where every row sees all cached positions; then `range_6T` is not read.
        """
        n = self.tile.n
        row_N2, line_N8 = self._rows
        cached_N = -(-start_S // n)[self.sequence_N]
        if fresh_2N is None:
            begin_N, end_N = key_blocks(range_6T, row_N2[:, 0], cached_N, n)
        else:
            begin_N, end_N = fresh_2N[0] * (cached_N == 0), cached_N + fresh_2N[1]
        if self.batch_invariant:
            most_N = (cached_N + -(-self.rows_N // n)).clip(1)
            # A power of two times the least, as large as it takes to have no more than MOST_SPLITS of them.
            times_N = -(-most_N // (self._least * MOST_SPLITS))
            per_N = self._least << np.frexp(times_N - 1.0)[1].astype(np.int64)
            begin_N = begin_N // per_N * per_N
            splits_N = np.maximum(-(-(end_N - begin_N) // per_N), 1)
        else:
            blocks_N = end_N - begin_N
            longest = longest_item(blocks_N, self.tile, self.groups, len(item_I8))
            splits_N = np.maximum(-(-blocks_N // longest), 1)
            per_N = -(-blocks_N // splits_N)
        item_N = np.cumsum(splits_N) - splits_N
        tile_N4[:, :2], tile_N4[:, 2], tile_N4[:, 3] = row_N2, item_N, splits_N
        # Begin and end of each tile's first item, and how far the next one is from it.
        line_N8, step_N = line_N8.copy(), per_N.astype(np.int32)
        line_N8[:, 4], line_N8[:, 5], line_N8[:, 7] = cached_N, begin_N - item_N * per_N, splits_N
        line_N8[:, 6] = line_N8[:, 5] + step_N
        count = int(item_N[-1] + splits_N[-1]) if len(item_N) else 0
        item_I8[:count], item_I8[count:] = np.repeat(line_N8, splits_N, axis=0), 0
        item_I8[:count, 5:7] += (np.repeat(step_N, splits_N) * np.arange(count, dtype=np.int32))[:, None]


def key_blocks(range_6T: np.ndarray, row_N: np.ndarray, cached_N: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Begin and end of the key blocks that some row of each tile sees something of.

    Args:
        range_6T: as of `Rows`. row_N: first pack row of each tile. cached_N: key blocks of its sequence's cache.
    """
    if not len(row_N):
        return row_N, row_N
    begin_3T, end_3T = range_6T[::2], range_6T[1::2]
    begin_3N = np.minimum.reduceat(np.where(end_3T > begin_3T, begin_3T, _FAR), row_N, axis=1)
    end_3N = np.maximum.reduceat(end_3T, row_N, axis=1).astype(np.int64)
    fresh_begin, fresh_end = np.minimum(begin_3N[1], begin_3N[2]), np.maximum(end_3N[1], end_3N[2])
    begin = np.where(begin_3N[0] < _FAR, begin_3N[0] // n, cached_N + np.minimum(fresh_begin, fresh_end) // n)
    end = np.where(fresh_begin < _FAR, cached_N + -(-fresh_end // n), -(-end_3N[0] // n))
    return begin, np.maximum(begin, end)


def longest_item(blocks_N: np.ndarray, tile: Tile, groups: int, room: int) -> int:
    """Key blocks of the longest item: those that take the least time, counted in what a key block takes on a full device.

    A program takes its item block after block, whatever the others do; waves of programs follow one another. Programs of one
    compute unit share its matrix units. All programs together are bound by the bandwidth. Partial results are written and read
    again beside that.
    """
    programs, most = tile.programs, int(blocks_N.max(initial=1))
    splits_C = np.arange(1, max(min(most // _LEAST_BLOCKS, MOST_SPLITS), 1) + 1)
    per_C = -(-most // splits_C)
    # In float64, whose division is several times as fast as that of integers: a quotient of such numbers is never rounded to a
    # whole one.
    items_C = np.ceil(np.maximum(blocks_N, 1) / per_C[:, None].astype(np.float64)).sum(1)
    programs_C = items_C * groups
    waves_C, on_a_unit_C = np.ceil(programs_C / programs), np.ceil(programs_C / tile.units)
    products = tile.m / (_BALANCED * tile.held)
    alone = _UNDER_WAY / (programs * tile.n * max(tile.stages - 1, 1))
    cost_C = (per_C + START) * np.maximum(waves_C * alone, on_a_unit_C * products)
    cost_C = np.maximum(cost_C, float(blocks_N.sum()) * groups / programs)
    # Four bytes a number, written and read, against two bytes a number of a key and a value. One split has no partial results.
    cost_C[1:] += programs_C[1:] / programs * (2 * tile.m / tile.n)
    cost_C[items_C > max(room, len(blocks_N))] = np.inf
    return int(per_C[cost_C.argmin()])
