"""Where the rows and keys of a small pack stand on a CPU: what one layout asks of every layer of `forward`.

Legend: T rows, S sequences, A = hops + 1 ancestors, L positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ...kernels.cca import NOTHING
from ...kernels.compiled import compiled
from ..layout import CLEAN, FROM_TAIL, TokenLayout
from ..state import SequenceState


@dataclass(frozen=True)
class PackedPlan:
    """One layout's places.

    Attributes:
        source_TA: each row and its ancestors, nearest first: a row of the pack, `NOTHING`, or -2 - n for tail entry n.
        write_T, tail_T: cache position that keeps each row, and tail entry; `NOTHING` for none.
        first_S1: first row of each sequence, and T. mask_S: first row of each behind its clean ones. start_S: cached positions
            of each.
        place_SL: cache position of each sequence's positions.
        range_4T: by layer type, begin and end of the clean keys and of its block's that each row sees. Keys of a sequence are its
            cached positions, then its rows of the pack: a clean key's number is its position.
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
        sequence, position, limit, block, parent, start = (
            x.numpy() for x in (layout.sequence_T, layout.position_T, layout.limit_T, layout.block_T, layout.parent_T,
                                layout.start_S)
        )  # fmt: skip
        rows, sequences = len(sequence), len(start)
        source, first = np.empty((rows, hops + 1), np.int64), np.empty(sequences + 1, np.int64)
        mask = np.empty(sequences, np.int64)
        ranges = {window: np.empty((4, rows), np.int64) for window in set(windows.values())}
        if state is None:
            write = tail = np.full(rows, NOTHING)
            table, tail_SH, size = np.zeros((sequences, 1), np.int64), np.zeros((sequences, hops), np.int64), 1
        else:
            paging = state.paging()
            write, tail, size = paging.write_T.numpy(), paging.tail_T.numpy(), paging.page_size
            table, tail_SH = paging.table_SP.numpy(), paging.tail_SH.numpy()
        place = np.empty((sequences, int(start.max())), np.int64)
        longest, masks = 1, 0
        for window, range_4T in ranges.items():
            longest, masks = _fill(
                sequence, position, limit, block, parent, start, tail_SH, table, size, window or 0, source, first, mask, place,
                range_4T,
            )  # fmt: skip
        kinds = {kind: ranges[window] for kind, window in windows.items()}
        return cls(source, write, tail, first, mask, start, place, kinds, longest, masks)


@compiled()
def _fill(sequence_T, position_T, limit_T, block_T, parent_T, start_S, tail_SH, table_SP, page_size, window, source_TA, first_S1,
          mask_S, place_SL, range_4T):  # fmt: skip
    """Writes the last five arrays; returns the most keys and the most mask rows of a sequence. `window` 0 sees everything."""
    rows, hops = len(sequence_T), source_TA.shape[1] - 1
    sequences = len(start_S)
    t = longest = masks = 0
    for s in range(sequences):
        first_S1[s] = t
        while t < rows and sequence_T[t] == s:
            t += 1
        for p in range(start_S[s]):
            place_SL[s, p] = table_SP[s, p // page_size] * page_size + p % page_size
    first_S1[sequences] = rows
    for s in range(sequences):
        first, start = first_S1[s], start_S[s]
        longest = max(longest, start + first_S1[s + 1] - first)
        clean = 0
        while first + clean < first_S1[s + 1] and block_T[first + clean] == CLEAN:
            clean += 1
        mask_S[s], masks = first + clean, max(masks, first_S1[s + 1] - first - clean)
        block_begin = clean
        for t in range(first, first_S1[s + 1]):
            at, back = t, 0
            source_TA[t, 0] = t
            for a in range(1, hops + 1):
                if at >= 0:
                    at = parent_T[at]
                    back = 0 if at == FROM_TAIL else hops
                else:
                    back += 1
                if at >= 0:
                    source_TA[t, a] = at
                elif back < min(hops, start):
                    source_TA[t, a] = -2 - tail_SH[s, back]
                else:
                    source_TA[t, a] = NOTHING
            range_4T[0, t] = max(position_T[t] - window + 1, 0) if window else 0
            range_4T[1, t] = max(min(limit_T[t] + 1, start + clean), range_4T[0, t])
            range_4T[2, t] = range_4T[3, t] = 0
            if block_T[t] != CLEAN:
                if t == first + clean or block_T[t] != block_T[t - 1]:
                    block_begin = t - first
                end = t + 1
                while end < first_S1[s + 1] and block_T[end] == block_T[t]:
                    end += 1
                range_4T[2, t], range_4T[3, t] = start + block_begin, start + end - first
    return longest, masks
