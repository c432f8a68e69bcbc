"""Plans: what all layers need to know of one layout, made once per forward pass. `PlainPlan` is torch's.

Invariants:
- Attention and convolutions read `Visibility`, never the order of rows.
- No tensor grows with T * T: a small pack, or one over a cache, is padded to [S, R] under a mask; a long one stays flat, cut into
  tiles.

Legend: T rows, S sequences, R rows of the longest sequence, L cached positions of the longest one, H query heads,
G key heads, D head size, C = (H + G) * D channels, A = hops + 1 ancestors, W = G * D / 2, P rotary features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from ..kernels.attention import LongPack, RowRanges, attend, score_dtype
from ..kernels.cca import CCAInputs, queries_keys_values
from ..kernels.transfer import upload
from .layout import TokenLayout
from .state import SequenceState
from .visibility import Visibility

PADDED_PAIRS = 2**24
"""Most (row, key) pairs of a padded pack; a pack without a cache that has more stays flat."""


class Plan(Protocol):
    """What attention of every layer needs to know of one layout."""

    def attend(
        self, layer: int, kind: str, inputs: CCAInputs, scale: float, state: SequenceState | None
    ) -> torch.Tensor:
        """out_THD of one layer, before its output projection. The clean rows are kept in the cache.

        Args: kind, the layer's type; state, the cache that the plan was made for.
        """


@dataclass(frozen=True)
class Padded:
    """A pack as a batch of sequences.

    Attributes:
        row_SR: row of the pack at each padded place (0 where padding).
        place_T: flat index into S * R of each row.
        visible: bool[S, R, L + R] by layer type.
    """

    row_SR: torch.Tensor
    place_T: torch.Tensor
    visible: dict[str, torch.Tensor]
    biases: dict[str, torch.Tensor] = field(default_factory=dict)

    def bias(self, kind: str, dtype: torch.dtype) -> torch.Tensor:
        """0 where `visible`, else -inf: made once for all layers."""
        if kind not in self.biases:
            visible = self.visible[kind]
            self.biases[kind] = torch.zeros((), dtype=dtype, device=visible.device).where(visible, -torch.inf)
        return self.biases[kind]

    @classmethod
    def of(cls, seen: Visibility, cached: int, device: torch.device) -> Padded:
        """Args: cached, L. The masks are made on `device`."""
        first_S, count_S, start_S = seen.first_S1[:-1], seen.count_S, seen.start_S
        line_R, past_L = np.arange(count_S.max(initial=1)), np.arange(cached)
        real_SR = line_R < count_S[:, None]
        row_SR = np.where(real_SR, first_S[:, None] + line_R, 0)
        place_T = seen.by_sequence(np.arange(len(count_S)) * len(line_R) - first_S) + np.arange(seen.first_S1[-1])
        # The key at each padded place; no range holds -1.
        key_SK = np.concatenate(
            [np.where(past_L < start_S[:, None], past_L, -1), np.where(real_SR, start_S[:, None] + line_R, -1)], axis=1
        )
        arrays = row_SR, place_T, key_SK, *seen.range_4T.values()
        row, place, key, *ranges = upload([torch.from_numpy(array) for array in arrays], device)
        return cls(row, place, {kind: _within(key, range_4T[:, row]) for kind, range_4T in zip(seen.range_4T, ranges)})


def _within(key_SK: torch.Tensor, range_4SR: torch.Tensor) -> torch.Tensor:
    """bool[S, R, K]: the key is in one of the row's two ranges."""
    key_S1K = key_SK[:, None]
    begin, end, block_begin, block_end = range_4SR[..., None]
    return (key_S1K >= begin) & (key_S1K < end) | (key_S1K >= block_begin) & (key_S1K < block_end)


@dataclass(frozen=True)
class PlainPlan:
    """One layout, in torch.

    Attributes:
        source_TA: as in `Visibility`.
        padded: of a small pack, or one over a cache.
        flat: of a long pack, by layer type.
    """

    source_TA: torch.Tensor
    padded: Padded | None
    flat: dict[str, LongPack]

    @classmethod
    def of(
        cls, layout: TokenLayout, state: SequenceState | None, hops: int, windows: Mapping[str, int | None], device: torch.device
    ) -> PlainPlan:
        """Of a host layout.

        Args:
            windows: sliding window by layer type; None sees everything.
            device: where the plan is made. A plan over a cache can be made on the host and moved.
        """
        tail_SH = None if state is None else state.paging().tail_SH.numpy()
        seen = Visibility.of(layout, hops, windows, tail_SH)
        source_TA = upload(torch.from_numpy(seen.source_TA), device)
        count_S = seen.count_S
        if state is not None or len(count_S) * int(count_S.max()) ** 2 <= PADDED_PAIRS:
            return cls(source_TA, Padded.of(seen, 0 if state is None else state.longest, device), {})
        # Without a cache the keys of a sequence are its rows.
        first_T = seen.by_sequence(seen.first_S1[:-1])
        packs: dict[int | None, LongPack] = {}
        for kind, window in windows.items():
            if window not in packs:
                packs[window] = LongPack.of(RowRanges(upload(torch.from_numpy(seen.range_4T[kind] + first_T), device)))
        return cls(source_TA, None, {kind: packs[window] for kind, window in windows.items()})

    def attend(
        self, layer: int, kind: str, inputs: CCAInputs, scale: float, state: SequenceState | None
    ) -> torch.Tensor:
        """See `Plan.attend`."""
        q, k, v = queries_keys_values(inputs, self.source_TA, None if state is None else state.pools(layer))
        if self.padded is None:
            return self.flat[kind].attend(q, k, v, scale)
        row_SR = self.padded.row_SR
        q_SRHD, k_SKGD, v_SKGD = (y.index_select(0, row_SR.flatten()).unflatten(0, row_SR.shape) for y in (q, k, v))
        if state is not None:
            past_k, past_v = state.read(layer, state.longest)
            k_SKGD, v_SKGD = torch.cat([past_k, k_SKGD], dim=1), torch.cat([past_v, v_SKGD], dim=1)
            state.write(layer, k, v, inputs.x_TC, inputs.delayed_TW)
        out_SRHD = attend(q_SRHD, k_SKGD, v_SKGD, self.padded.bias(kind, score_dtype(q)), scale)
        return out_SRHD.flatten(0, 1).index_select(0, self.padded.place_T)
