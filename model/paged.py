"""What a layout asks of every layer where attention and CCA run as kernels on the cache's own pages.

Invariants: made on the host, sent in one copy, and nothing is read back, so that a step can be captured. No mask and no gathered
copy of the cache exists.

Legend: T rows, S sequences, A = hops + 1 ancestors, H = hops.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels.attention import Rows
from ..kernels.cca import NOTHING, Places
from ..kernels.dispatch import batch_invariant
from .layout import FROM_TAIL, TokenLayout
from .state import Paging, SequenceState


@dataclass(frozen=True)
class PagedPlan:
    """One layout over one cache, or over none.

    Attributes:
        places: where rows find their ancestors and are kept.
        rows: who sees whom, by layer type.
    """

    places: Places
    rows: dict[str, Rows]

    @classmethod
    def of(
        cls,
        layout: TokenLayout,
        state: SequenceState | None,
        hops: int,
        windows: dict[str, int | None],
        *,
        heads: int,
        kv_heads: int,
        dtype: torch.dtype,
    ) -> PagedPlan:
        """Of host tensors, from a host layout.

        Args: windows, sliding window by layer type, None sees everything; dtype, of the policy.
        """
        paging = _without_cache(layout, hops) if state is None else state.paging()
        ancestor_TA = layout.ancestors(hops)
        back_TA = (FROM_TAIL - ancestor_TA).clamp_min(0)
        entry_TA = paging.tail_SH[layout.sequence_T[:, None], back_TA.clamp_max(hops - 1)]
        before_TA = torch.where(back_TA < hops, -2 - entry_TA, NOTHING)
        source_TA = torch.where(ancestor_TA >= 0, ancestor_TA, before_TA)
        places = Places.of(source_TA, paging.write_T, paging.tail_T, paging.apart, "cpu")
        rows = {
            window: Rows.of(
                layout.sequence_T, layout.position_T, layout.limit_T, layout.block_T, layout.start_S, paging.table_SP,
                page_size=paging.page_size, heads=heads, kv_heads=kv_heads, dtype=dtype, window=window,
                batch_invariant=batch_invariant(),
            )
            for window in set(windows.values())
        }  # fmt: skip
        return cls(places, {kind: rows[window] for kind, window in windows.items()})


def _without_cache(layout: TokenLayout, hops: int) -> Paging:
    """Nothing is read and nothing kept."""
    nothing_T = torch.full((layout.rows,), NOTHING)
    tail_SH = torch.zeros(layout.sequences, hops, dtype=torch.int64)
    return Paging(16, torch.zeros(layout.sequences, 1, dtype=torch.int64), tail_SH, nothing_T, nothing_T, False)
