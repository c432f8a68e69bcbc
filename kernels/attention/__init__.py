"""Attention of a pack of rows over cached and fresh keys.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j   over the j that row i sees

Grouped-query attention: query head h reads key head h // (heads / kv_heads) (arXiv 2305.13245). Row i sees clean keys up to
its limit, within the layer's sliding window, and every row of its own mask block.

`attend` takes padded tensors: rows of a sequence padded to R, its cached positions to L, and a mask `visible_SRK` (K = L + R).
`paged_attend` takes the flat pack and the cache's own pages; `Rows` says by ranges what each row sees.
`LongPack` cuts a long pack without a cache into tiles by its `RowRanges`, so that nothing grows with the square of its length. It
has gradients: through FlexAttention on an accelerator, tile by tile on a CPU.
"""

from ..dispatch import dispatched
from . import reference
from .long import LongPack
from .ranges import RowRanges
from .reference import attend, score_dtype
from .rows import Rows

__all__ = ["LongPack", "RowRanges", "Rows", "attend", "paged_attend", "score_dtype"]

paged_attend = dispatched(reference.paged_attend)
