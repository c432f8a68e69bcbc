"""Attention of a pack of rows over cached and fresh keys.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j   over the j that row i sees

Rows of a sequence are padded to R, its cached positions to L; `visible_SRK` (K = L + R) is the layout's rule. Grouped-query
attention: query head h reads key head h // (heads / kv_heads). Source: grouped-query attention, arXiv 2305.13245.
"""

from .reference import attend

__all__ = ["attend"]
