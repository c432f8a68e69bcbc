"""Where the rows of one forward pass lie in the cache.

Legend: T rows, S sequences, P pages of the longest table, H hops.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..kernels.cca import NOTHING
from ..kernels.dispatch import compiled_where_installed
from ..model.layout import CLEAN, TokenLayout


class CacheSizes(NamedTuple):
    """How a cache is cut up.

    Attributes:
        page_size: positions of a page.
        ring: tail entries of a slot. The rings of all slots come first among the tail entries.
        page_tail: tail entries of a page, those of its last positions. first_page_tail: the first one of page 0.
    """

    page_size: int
    ring: int
    page_tail: int
    first_page_tail: int

    def tail_entries(
        self, slot: np.ndarray, page: np.ndarray, position: np.ndarray, in_page: np.ndarray | None = None
    ) -> np.ndarray:
        """The tail entries of positions, int64. The arguments broadcast.

        Args:
            slot: of the sequence. page: the number of the page that holds the position. in_page: the place in it, where known.
        """
        offset = (position % self.page_size if in_page is None else in_page) - (self.page_size - self.page_tail)
        with_page = self.first_page_tail + page * self.page_tail + offset
        return np.where(offset >= 0, with_page, slot * self.ring + position % self.ring)


class CachePlaces(NamedTuple):
    """Host arrays, int64.

    Attributes:
        write_T, tail_T: pool position and tail entry that keep each row; `NOTHING` for none.
        tail_SH: tail entry of each of the H tokens before each start, nearest first; any entry where there is no such token.
        apart: some row is kept in a tail entry that another row may still read.
    """

    write_T: np.ndarray
    tail_T: np.ndarray
    tail_SH: np.ndarray
    apart: bool

    @classmethod
    def of(
        cls, layout: TokenLayout, slot_S: np.ndarray, pages_S: np.ndarray, table_SP: np.ndarray, sizes: CacheSizes, hops: int
    ) -> CachePlaces:
        """Of a host layout.

        Args:
            slot_S, pages_S: tail slot and number of pages of each sequence. table_SP: its pages, then any.
        """
        write, tail = np.full((2, layout.rows), NOTHING)
        tail_SH = np.empty((len(slot_S), hops), np.int64)
        rows = (x.numpy() for x in (layout.sequence_T, layout.position_T, layout.block_T, layout.start_S))
        apart = compiled_where_installed(_fill_places)(*rows, slot_S, pages_S, table_SP, *sizes, write, tail, tail_SH)
        return cls(write, tail, tail_SH, bool(apart))


def _fill_places(sequence_T, position_T, block_T, start_S, slot_S, pages_S, table_SP, page_size, ring, page_tail, first_page_tail,
                 write_T, tail_T, tail_SH):  # fmt: skip
    """Writes the last three arrays; returns whether the rows are `apart`. Clean rows come first in a sequence, in order."""
    rows, hops, plain, apart = len(sequence_T), tail_SH.shape[1], page_size - page_tail, False
    t = 0
    for s in range(len(start_S)):
        begin = slot_S[s] * ring
        for h in range(hops):
            position = max(start_S[s] - 1 - h, 0)
            page = table_SP[s, min(position // page_size, table_SP.shape[1] - 1)]
            offset = position % page_size - plain
            tail_SH[s, h] = first_page_tail + page * page_tail + offset if offset >= 0 else begin + position % ring
        first = t
        while t < rows and sequence_T[t] == s and block_T[t] == CLEAN and position_T[t] < pages_S[s] * page_size:
            t += 1
        if t > first:
            end = position_T[t - 1]
            apart = apart or end + 1 - start_S[s] + hops > ring
            for r in range(first, t):
                position = position_T[r]
                page, offset = table_SP[s, position // page_size], position % page_size
                write_T[r] = page * page_size + offset
                if offset >= plain:
                    tail_T[r] = first_page_tail + page * page_tail + offset - plain
                elif position > end - ring:  # of a chunk longer than the ring, the ring keeps the last rows only
                    tail_T[r] = begin + position % ring
        while t < rows and sequence_T[t] == s:
            t += 1
    return apart
