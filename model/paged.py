"""PagedPlan: the plan of a layout where attention and CCA run as kernels on the cache's own pages.

Invariants: made on the host, sent in one copy, and nothing is read back, so that a step can be captured. No mask and no gathered
copy of the cache exists.

Legend: T rows, S sequences, H = hops.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..kernels.attention import Rows, paged_attend
from ..kernels.cca import NOTHING, CCAInputs, Places, cca
from ..kernels.dispatch import batch_invariant
from .layout import TokenLayout
from .state import Paging, SequenceState
from .visibility import Visibility


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
        windows: Mapping[str, int | None],
        *,
        heads: int,
        kv_heads: int,
        dtype: torch.dtype,
    ) -> PagedPlan:
        """Of host tensors, from a host layout.

        Args: windows, sliding window by layer type, None sees everything; dtype, of the policy.
        """
        paging = _without_cache(layout, hops) if state is None else state.paging()
        seen = Visibility.of(layout, hops, windows, paging.tail_SH.numpy())
        places = Places.of(torch.from_numpy(seen.source_TA), paging.write_T, paging.tail_T, paging.apart, "cpu")
        rows: dict[int | None, Rows] = {}
        for kind, window in windows.items():
            if window not in rows:
                rows[window] = Rows.of(
                    seen.range_4T[kind], seen.first_S1, seen.start_S, paging.table_SP, page_size=paging.page_size, heads=heads,
                    kv_heads=kv_heads, dtype=dtype, batch_invariant=batch_invariant(),
                )  # fmt: skip
        return cls(places, {kind: rows[window] for kind, window in windows.items()})

    def attend(
        self, layer: int, kind: str, inputs: CCAInputs, scale: float, state: SequenceState | None
    ) -> torch.Tensor:
        """See `plan.Plan.attend`."""
        pools = None if state is None else state.pools(layer)
        q, k, v = cca(inputs, self.places, pools)
        # Without a cache nothing is read from the pools.
        k_pool, v_pool = (k, v) if pools is None else (pools.k, pools.v)
        return paged_attend(q, k, v, k_pool, v_pool, self.rows[kind], scale)


def _without_cache(layout: TokenLayout, hops: int) -> Paging:
    """The paging of a pass without a cache: nothing is read and nothing is kept."""
    nothing_T = torch.full((layout.rows,), NOTHING)
    tail_SH = torch.zeros(layout.sequences, hops, dtype=torch.int64)
    return Paging(16, torch.zeros(layout.sequences, 1, dtype=torch.int64), tail_SH, nothing_T, nothing_T, False)
