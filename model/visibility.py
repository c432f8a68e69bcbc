"""Visibility: who sees whom and who precedes whom in a layout, as ranges of keys and rows of ancestors.

`TokenLayout` states the rule. This module is the only place that works the rule out; every backend reads its result.

The keys of a sequence are its cached positions, then its rows in the pack: row r, counted from the sequence's first row, is key
start + r. Clean rows come first and continue the cache, so the key of a clean token is its position.

Invariants of every layout that are used here:
- Within a sequence the clean rows come first, in the order of their positions.
- The rows of a mask block are contiguous.

Legend: T rows, S sequences, A = hops + 1 ancestors, H tail entries of a sequence, W windows, one per layer type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..kernels.cca import NOTHING
from ..kernels.dispatch import compiled_where_installed
from .layout import CLEAN, FROM_TAIL, TokenLayout


@dataclass(frozen=True)
class Visibility:
    """Host arrays of one layout, int64.

    Attributes:
        first_S1: first row of each sequence, and T.
        clean_S: clean rows of each sequence.
        start_S: cached positions of each sequence.
        source_TA: each row and its ancestors, nearest first: a row of the pack, `NOTHING` before the document, or -2 - n for tail
            entry n of the cache.
        kinds: the W layer types.
        range_W4T: begin and end of the clean keys that each row sees, then begin and end of the keys of its mask block (0 and 0
            for a clean row).
    """

    first_S1: np.ndarray
    clean_S: np.ndarray
    start_S: np.ndarray
    source_TA: np.ndarray
    kinds: tuple[str, ...]
    range_W4T: np.ndarray

    @classmethod
    def of(
        cls, layout: TokenLayout, hops: int, windows: Mapping[str, int | None], tail_SH: np.ndarray | None = None
    ) -> Visibility:
        """Work the rule out.

        Args:
            layout: on the host.
            hops: A - 1.
            windows: sliding window over clean keys by layer type; None sees everything.
            tail_SH: int64, tail entry of each of the H = hops tokens before a sequence's start, nearest first; None without a
                cache.
        """
        sequence, position, limit, block, parent, start = (
            x.numpy() for x in (layout.sequence_T, layout.position_T, layout.limit_T, layout.block_T, layout.parent_T,
                                layout.start_S)
        )  # fmt: skip
        rows, sequences = len(sequence), len(start)
        first, clean = np.empty(sequences + 1, np.int64), np.empty(sequences, np.int64)
        source = np.empty((rows, hops + 1), np.int64)
        ranges, window = np.empty((len(windows), 4, rows), np.int64), np.array([size or 0 for size in windows.values()], np.int64)
        if tail_SH is None:
            tail_SH = np.empty((sequences, 0), np.int64)
        fill = compiled_where_installed(_fill_rows)
        fill(sequence, position, limit, block, parent, start, tail_SH, window, first, clean, source, ranges)
        return cls(first, clean, start, source, tuple(windows), ranges)

    @property
    def range_4T(self) -> dict[str, np.ndarray]:
        """`range_W4T` by layer type."""
        return dict(zip(self.kinds, self.range_W4T, strict=True))

    @property
    def count_S(self) -> np.ndarray:
        """Rows of each sequence."""
        return np.diff(self.first_S1)

    def by_sequence(self, of_S: np.ndarray) -> np.ndarray:
        """A number of each sequence, for each row."""
        return np.repeat(of_S, self.count_S)


def _fill_rows(sequence_T, position_T, limit_T, block_T, parent_T, start_S, tail_SH, window_W, first_S1, clean_S, source_TA,
               range_W4T):  # fmt: skip
    """Writes the last four arrays. A window of 0 sees everything."""
    rows, hops, sequences = len(sequence_T), source_TA.shape[1] - 1, len(start_S)
    t = 0
    for s in range(sequences):
        first, start = t, start_S[s]
        first_S1[s] = first
        while t < rows and sequence_T[t] == s and block_T[t] == CLEAN:
            range_W4T[:, 2:, t] = 0
            t += 1
        clean_S[s] = t - first
        last_clean = start + t - first
        while t < rows and sequence_T[t] == s:
            begin = t
            while t < rows and sequence_T[t] == s and block_T[t] == block_T[begin]:
                t += 1
            range_W4T[:, 2, begin:t] = start + begin - first
            range_W4T[:, 3, begin:t] = start + t - first
        cached = min(tail_SH.shape[1], start)
        for r in range(first, t):
            end = min(limit_T[r] + 1, last_clean)
            for w in range(len(window_W)):
                begin = max(position_T[r] - window_W[w] + 1, 0) if window_W[w] else 0
                range_W4T[w, 0, r] = min(begin, end)
                range_W4T[w, 1, r] = end
            source_TA[r, 0] = r
            at, back = r, 0
            for a in range(1, hops + 1):
                if at >= 0:
                    at = parent_T[at]
                    back = 0 if at == FROM_TAIL else hops
                else:
                    back += 1
                if at >= 0:
                    source_TA[r, a] = at
                elif back < cached:
                    source_TA[r, a] = -2 - tail_SH[s, back]
                else:
                    source_TA[r, a] = NOTHING
    first_S1[sequences] = rows
