"""Top-1 mixture of experts with a skip expert.

    out_t = p_t * W_down[e] (silu(W_gate[e] x_t) * (W_up[e] x_t)),   e = expert_t;   0 where expert_t is the skip expert
"""

from .reference import route_top1

__all__ = ["route_top1"]
