"""Where the rows and keys of a small pack stand on a CPU: what one layout asks of every layer of `forward`.

Invariants:
- The key of a clean row stands at its position, whatever is cached and whatever stands beside its sequence; keys of mask
  rows come after all of those. Keys are padded to a multiple of 16, rows of a sequence to an even number (of four with heads
  of 64, of eight with heads of 128), and a pack of one row is computed as two. So a clean row's numbers are always added up
  in the same order: what it gives depends on its prefix alone, to the last bit, in every batch, chunk and step. (Measured
  with oneMKL, whose products of two rows or more have one order, and with heads of 16 and more; elsewhere it is the same up
  to rounding.)

Legend: T rows, S sequences, R rows of the longest one, padded, P places of clean keys, K all places, A ancestors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ..cca import ancestor_index
from ..layout import CLEAN, TokenLayout

_PLACES = 16


@dataclass(frozen=True)
class PackedPlan:
    """One layout's places.

    Attributes:
        sequences: S. positions: P.
        twice: the pack's one row is computed as two.
        ancestor_TA: index into `[zero row, S * hops tail entries, T rows]`; None where every row is its sequence's only one
            and all its ancestors are in the tail.
        query_SR: pack row at each place (row 0 where padding). place_T: flat index into S * R of each row.
        clean_SP: pack row of each clean key, where nothing is cached.
        mask_SM: pack row of each key from place P on (row 0 where padding); None where there are none.
        bias: float32[S, R, K] by layer type, 0 where the row sees the key, else -inf.
    """

    sequences: int
    positions: int
    twice: bool
    ancestor_TA: torch.Tensor | None
    query_SR: torch.Tensor
    place_T: torch.Tensor
    clean_SP: torch.Tensor
    mask_SM: torch.Tensor | None
    bias: dict[str, torch.Tensor]

    @classmethod
    def of(cls, layout: TokenLayout, hops: int, windows: Mapping[str, int | None], head_dim: int) -> PackedPlan:
        """Args: layout, on this host. windows, sliding window by layer type; None sees everything."""
        sequence, position, limit, block, start = (
            x.numpy() for x in (layout.sequence_T, layout.position_T, layout.limit_T, layout.block_T, layout.start_S)
        )
        sequences, rows = len(start), len(sequence)
        count = np.bincount(sequence, minlength=sequences)
        first = count.cumsum() - count
        width = _padded(int(count.max()), max(2, head_dim // 16))
        line = np.arange(width)
        query_SR = np.where(line < count[:, None], first[:, None] + line, 0)
        place = np.arange(rows) + (np.arange(sequences) * width - first)[sequence]

        clean = block == CLEAN
        end = start.copy()
        np.maximum.at(end, sequence[clean], position[clean] + 1)
        positions = _padded(int(end.max()), _PLACES)
        line = np.arange(positions)
        clean_SP = np.where(line < (end - start)[:, None], first[:, None] + line, 0)
        seen_SRP = line <= limit[query_SR][..., None]
        masks, mask_SM, own_SRM = np.flatnonzero(~clean), None, np.zeros((sequences, width, 0), dtype=bool)
        if len(masks):
            owner = sequence[masks]
            count = np.bincount(owner, minlength=sequences)
            most = _padded(int(count.max()), _PLACES)
            mask_SM, key_block_SM = np.zeros((sequences, most), dtype=np.int64), np.full((sequences, most), CLEAN - 1)
            nth = np.arange(len(masks)) - (count.cumsum() - count)[owner]
            mask_SM[owner, nth], key_block_SM[owner, nth] = masks, block[masks]
            own_SRM = block[query_SR][..., None] == key_block_SM[:, None]
        bias = {}
        for kind, window in windows.items():
            near_SRP = seen_SRP if window is None else seen_SRP & (line > position[query_SR][..., None] - window)
            sees_SRK = np.concatenate([near_SRP, own_SRM], axis=-1)
            bias[kind] = torch.from_numpy(np.where(sees_SRK, np.float32(0), np.float32(-np.inf)))

        alone = rows == sequences and not len(masks) and int(start.min()) >= hops
        ancestor_TA = None if alone else ancestor_index(layout, hops)
        twice = rows == 1
        if twice:
            place = np.arange(2)
            ancestor_TA = None if ancestor_TA is None else ancestor_TA.expand(2, -1)
        return cls(
            sequences, positions, twice, ancestor_TA, torch.from_numpy(query_SR), torch.from_numpy(place),
            torch.from_numpy(clean_SP), None if mask_SM is None else torch.from_numpy(mask_SM), bias,
        )  # fmt: skip


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
