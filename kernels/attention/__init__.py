"""Attention of a pack of rows over cached and fresh keys.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j   over the j that row i sees

Grouped-query attention: query head h reads key head h // (heads / kv_heads) (arXiv 2305.13245). Row i sees clean keys up to
its limit, within the layer's sliding window, and every row of its own mask block.

`attend` takes padded tensors: rows of a sequence padded to R, its cached positions to L, and a mask `visible_SRK` (K = L + R).
`paged_attend` takes the flat pack and the cache's own pages; `Rows` says by ranges what each row sees.
`LongPack` cuts a long pack without a cache into tiles by its `RowRanges`, so that nothing grows with the square of its length. It
has gradients: through FlexAttention on an accelerator, tile by tile on a CPU.
"""

import torch

from ..dispatch import takes_triton
from . import reference
from .long import LongPack
from .ranges import RowRanges
from .reference import attend
from .rows import Rows

__all__ = ["LongPack", "RowRanges", "Rows", "attend", "paged_attend"]


def paged_attend(
    q_THD: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    k_pool_KGD: torch.Tensor,
    v_pool_KGD: torch.Tensor,
    rows: Rows,
    scale: float,
) -> torch.Tensor:
    """Returns out_THD; a row that sees nothing gives 0.

    Args:
        q_THD, k_TGD, v_TGD: the pack; heads contiguous, any stride between rows.
        k_pool_KGD, v_pool_KGD: one layer's pool of K = pages * page_size positions, contiguous, on the same device. Read
            only below each sequence's `start_S`; the pack's own keys come from k_TGD and v_TGD.
        rows: who sees what. Nothing is read back from the device, so the call can be captured in a graph.

    In Triton this is one or two launches, without gradients.
    """
    if takes_triton(q_THD, k_TGD, v_TGD):
        from . import triton as fast

        return fast.paged_attend(q_THD, k_TGD, v_TGD, k_pool_KGD, v_pool_KGD, rows, scale)
    return reference.paged_attend(q_THD, k_TGD, v_TGD, k_pool_KGD, v_pool_KGD, rows, scale)
