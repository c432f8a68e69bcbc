"""Inputs of a pass that recurs: every sequence runs the same rows as before, at other positions.

Invariants:
- The inputs equal those that `decode`, `CacheView` and `PagedPlan` make of the same rows, number for number
  (`tests/rollout/steps/test_recurring.py`). They are made in a few operations over the pack, whatever the number of rows.
- On the device the inputs keep their place, so that a captured pass finds the new values where the old ones were.
- Padding changes no result: a sequence of padding holds no pages, and a row past its sequence's pages is not kept.

Legend: S sequences, those of padding last; R rows of each, C of them clean; P pages, A = hops + 1 ancestors, H = hops.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ...kernels.cca import NOTHING
from ...kernels.transfer import PinnedCopy
from ...model.layout import FROM_START, FROM_TAIL, DecodeRows, TokenLayout, decode
from ...model.paged import PagedPlan
from ...model.policy import Policy
from ..cache import BlockTable, CacheView, PagedCache

_NO_PAGES = np.zeros(0, dtype=np.int64)
"""Of a sequence of padding."""


def bucket(count: int) -> int:
    """The smallest of 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, ... that is not below `count`."""
    size = 1 << (count - 1).bit_length()
    return size * 3 // 4 if size >= 32 and count <= size * 3 // 4 else size


class RecurringInputs:
    """Layout and plan of one shape.

    Args:
        rows: what each sequence runs; its start is ignored, its tokens are placeholders.
        sequences: S, a `bucket`.
        width: P, columns of the table of pages.

    Attributes:
        layout, plan: on the host, as the latest `at` made them.
        view: gives the pools of the cache.
        clean: C.
    """

    def __init__(self, policy: Policy, cache: PagedCache, rows: DecodeRows, sequences: int, width: int) -> None:
        self._cache, hops = cache, cache.hops
        # Far enough from the start that every ancestor before the pack is in the tail.
        anywhere = DecodeRows(rows.clean, hops, rows.proposals, rows.block_length)
        self.layout = decode([anywhere] * sequences, policy.mask_token_id)
        self.view: CacheView = cache.view([BlockTable(0)] * sequences, self.layout, width)
        self.plan = plan = policy.paged_plan(self.layout, self.view)
        self._hops = hops
        self.clean = clean = len(rows.clean)
        self._slot = np.zeros(sequences, dtype=np.int64)
        self._start, self._pages = np.zeros_like(self._slot), np.zeros_like(self._slot)
        self._written: list[np.ndarray] = [_NO_PAGES] * sequences

        def by_sequence(flat: torch.Tensor) -> np.ndarray:
            return flat.numpy().reshape(sequences, -1, *flat.shape[1:])

        layout, places = self.layout, plan.places
        self._token_SR, self._position_SR, self._limit_SR, self._parent_SR = map(
            by_sequence, (layout.token_T, layout.position_T, layout.limit_T, layout.parent_T)
        )
        self._line_R, self._last_R = self._position_SR[0] - hops, self._limit_SR[0] - hops
        self._opens_R = np.flatnonzero(self._parent_SR[0] == FROM_TAIL)
        self._write_SR, self._tail_SR = map(by_sequence, (places.write_T, places.tail_T))
        self._source_SRA, self._first_column_S1 = by_sequence(places.source_TA), np.arange(sequences)[:, None] * width
        self._from_tail = _from_tail(self._parent_SR[0], hops)
        self._rows = list({id(each): (each, policy.windows[kind]) for kind, each in plan.rows.items()}.values())
        self._range_6SR = [each.range_6T.numpy().reshape(6, sequences, -1) for each, _ in self._rows]
        # What a tile sees of the pack is the same at every start, but for a window's begin.
        self._fresh = [each.cut.fresh_blocks(each.range_6T.numpy()) if w is None else None for each, w in self._rows]
        moving = [layout.token_T] if clean else []
        moving += [layout.position_T, layout.limit_T, layout.parent_T, layout.start_S]
        moving += [places.source_TA, places.write_T, places.tail_T]
        for each, _ in self._rows:
            moving += [each.range_6T, each.start_S, each.table_SP, each.tile_N4, each.item_I8]
        self._moving = moving

    def pinned_copy(self, device: torch.device) -> PinnedCopy[tuple[TokenLayout, PagedPlan]]:
        """Layout and plan on the device. Call its `send` after each `at`."""
        return PinnedCopy((self.layout, self.plan), device, self._moving)

    def at(self, tables: Sequence[BlockTable], starts: Sequence[int], first: Sequence[int] | None) -> None:
        """Make the inputs of these sequences, in order; the sequences after them are padding.

        Args:
            tables: pages of each sequence.
            starts: position of its first row.
            first: token of that row; None where only the device knows it.
        """
        cache, size, clean, count = self._cache, self._cache.page_size, self.clean, len(tables)
        start, slot, pages, table = self._start, self._slot, self._pages, self._rows[0][0].table_SP.numpy()
        self._write_pages(tables, table, pages)
        start[:count], start[count:] = starts, 0
        slot[:count], slot[count:] = [each.slot for each in tables], 0
        if first is not None:
            self._token_SR[:count, 0] = first
        np.add(self._line_R, start[:, None], out=self._position_SR)
        np.add(self._last_R, start[:, None], out=self._limit_SR)
        self._parent_SR[:, self._opens_R] = np.where(start > 0, FROM_TAIL, FROM_START)[:, None]
        self.layout.start_S.numpy()[:] = start

        position_SC = self._position_SR[:, :clean]
        inside_SC = position_SC < (pages * size)[:, None]
        number_SC, offset_SC = np.divmod(position_SC, size)
        page_SC = table.ravel()[np.minimum(number_SC, table.shape[1] - 1) + self._first_column_S1].astype(np.int64)
        self._write_SR[:, :clean] = np.where(inside_SC, page_SC * size + offset_SC, NOTHING)
        entry_SC = cache.sizes.tail_entries(slot[:, None], page_SC, position_SC, offset_SC)
        self._tail_SR[:, :clean] = np.where(inside_SC, entry_SC, NOTHING)
        back_SH = np.maximum(start[:, None] - 1 - np.arange(self._hops), 0)
        page_SH = table[np.arange(len(start))[:, None], np.minimum(back_SH // size, table.shape[1] - 1)].astype(np.int64)
        tail_SH = cache.sizes.tail_entries(slot[:, None], page_SH, back_SH)
        row_K, hop_K, back_K = self._from_tail
        known_SK = back_K < start[:, None]
        self._source_SRA[:, row_K, hop_K] = np.where(known_SK, -2 - tail_SH[:, back_K], NOTHING)
        for (rows, window), range_6SR, fresh_2N in zip(self._rows, self._range_6SR, self._fresh, strict=True):
            # Every row sees the cached positions to their end. What it sees of the pack is the same at every start, but for a
            # window's begin.
            range_6SR[1] = start[:, None]
            if window is not None:
                begin_SR = np.minimum(self._position_SR - (window - 1), self._limit_SR + 1)
                np.clip(begin_SR, 0, start[:, None], out=range_6SR[0], casting="unsafe")
                np.maximum(np.minimum(begin_SR - start[:, None], clean), 0, out=range_6SR[2], casting="unsafe")
            rows.start_S.numpy()[:] = start
            rows.deal(fresh_2N)
            if rows is not self._rows[0][0]:
                rows.table_SP.copy_(self._rows[0][0].table_SP)

    def _write_pages(self, tables: Sequence[BlockTable], table_SP: np.ndarray, pages_S: np.ndarray) -> None:
        """Write the pages of each sequence, and their number. A row whose block table has the same array of pages as the last
        time stays: `BlockTable.pages` is replaced, never written to."""
        written, rows = self._written, [each.pages for each in tables]
        rows += [_NO_PAGES] * (len(written) - len(rows))
        for i, own in enumerate(rows):
            if own is not written[i]:
                count = len(own)
                table_SP[i, :count], table_SP[i, count:], pages_S[i] = own, 0, count
        self._written = rows


def _from_tail(parent_R: np.ndarray, hops: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ancestors of a sequence's rows that lie before the pack: (row, hop, how many tokens before the start, from 0), each
    int64[K]. `parent_R`: of the first sequence of a pack, at a start with `hops` tokens before it."""
    found = []
    for row in range(len(parent_R)):
        at, back = row, -1
        for hop in range(1, hops + 1):
            at = parent_R[at] if at >= 0 else at
            back += at < 0
            if at < 0:
                found.append((row, hop, back))
    row_K, hop_K, back_K = np.array(found, dtype=np.int64).reshape(-1, 3).T
    return row_K, hop_K, back_K
