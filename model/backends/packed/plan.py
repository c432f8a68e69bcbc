"""PackedPlan: where the rows and keys of one layout lie, for every layer of `PackedBackend`.

Legend: T rows, S sequences, A = hops + 1 ancestors, L positions, W windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ....kernels.cca import NOTHING
from ....kernels.compiled import compiled
from ...layout import TokenLayout
from ...state import SequenceState
from ...visibility import Visibility


class PackedPlan(NamedTuple):
    """The places of one layout.

    Attributes:
        token_T, position_T: int64, the layout's own.
        source_TA, range_W4T: as in `Visibility`.
        write_T, tail_T: cache position that keeps each row, and tail entry; `NOTHING` for none.
        first_S1: first row of each sequence, and T. mask_S: first mask row of each sequence, or its end. start_S: cached
            positions of each sequence.
        place_SL: cache position of each sequence's positions.
        longest: most keys of a sequence.
    """

    token_T: np.ndarray
    position_T: np.ndarray
    source_TA: np.ndarray
    range_W4T: np.ndarray
    write_T: np.ndarray
    tail_T: np.ndarray
    first_S1: np.ndarray
    mask_S: np.ndarray
    start_S: np.ndarray
    place_SL: np.ndarray
    longest: int

    @classmethod
    def of(cls, layout: TokenLayout, state: SequenceState | None, hops: int, windows: Mapping[str, int | None]) -> PackedPlan:
        """Args: layout, on this host. windows, sliding window by layer type; None sees everything."""
        if state is None:
            seen = Visibility.of(layout, hops, windows)
            write = tail = np.full(layout.rows, NOTHING)
            table, size = np.zeros((layout.sequences, 1), np.int64), 1
        else:
            paging = state.paging()
            seen = Visibility.of(layout, hops, windows, paging.tail_SH.numpy())
            write, tail, size = paging.write_T.numpy(), paging.tail_T.numpy(), paging.page_size
            table = paging.table_SP.numpy()
        first, start = seen.first_S1, seen.start_S
        mask, place = np.empty(len(start), np.int64), np.empty((len(start), int(start.max())), np.int64)
        longest = _place(first, seen.clean_S, start, table, size, mask, place)
        rows = layout.token_T.numpy(), layout.position_T.numpy()
        return cls(*rows, seen.source_TA, seen.range_W4T, write, tail, first, mask, start, place, longest)


@compiled()
def _place(first_S1, clean_S, start_S, table_SP, page_size, mask_S, place_SL):
    """Writes the last two arrays; returns the most keys of a sequence."""
    longest = 1
    for s in range(len(start_S)):
        for p in range(start_S[s]):
            place_SL[s, p] = table_SP[s, p // page_size] * page_size + p % page_size
        mask_S[s] = first_S1[s] + clean_S[s]
        longest = max(longest, start_S[s] + first_S1[s + 1] - first_S1[s])
    return longest
