"""PackedPlan: where the rows and keys of one layout lie, for every layer of `PackedBackend`.

Legend: T rows, S sequences, A = hops + 1 ancestors, L positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ....kernels.cca import NOTHING
from ....kernels.compiled import compiled
from ...layout import TokenLayout
from ...state import SequenceState
from ...visibility import Visibility


@dataclass(frozen=True)
class PackedPlan:
    """The places of one layout.

    Attributes:
        source_TA, range_4T: as in `Visibility`.
        write_T, tail_T: cache position that keeps each row, and tail entry; `NOTHING` for none.
        first_S1: first row of each sequence, and T. mask_S: first mask row of each sequence, or its end. start_S: cached
            positions of each sequence.
        place_SL: cache position of each sequence's positions.
        longest, masks: most keys and most mask rows of a sequence.
    """

    source_TA: np.ndarray
    write_T: np.ndarray
    tail_T: np.ndarray
    first_S1: np.ndarray
    mask_S: np.ndarray
    start_S: np.ndarray
    place_SL: np.ndarray
    range_4T: dict[str, np.ndarray]
    longest: int
    masks: int

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
        longest, masks = _place(first, seen.clean_S, start, table, size, mask, place)
        return cls(seen.source_TA, write, tail, first, mask, start, place, seen.range_4T, longest, masks)


@compiled()
def _place(first_S1, clean_S, start_S, table_SP, page_size, mask_S, place_SL):
    """Writes the last two arrays; returns the most keys and the most mask rows of a sequence."""
    longest, masks = 1, 0
    for s in range(len(start_S)):
        for p in range(start_S[s]):
            place_SL[s, p] = table_SP[s, p // page_size] * page_size + p % page_size
        mask_S[s] = first_S1[s] + clean_S[s]
        longest = max(longest, start_S[s] + first_S1[s + 1] - first_S1[s])
        masks = max(masks, first_S1[s + 1] - mask_S[s])
    return longest, masks
