"""Top-1 mixture of experts with a skip expert.

    out_t = p_t * W_down[e] (silu(W_gate[e] x_t) * (W_up[e] x_t)),   e = expert_t;   0 where expert_t is the skip expert

and the router that chooses them, whose state s goes from layer to layer (exponential depth averaging, EDA):

    s_t      = W_d x_t + b_d + scale * s_t of the layer below
    probs_t  = softmax(W_3 gelu(W_2 gelu(W_1 rms_norm(s_t) + b_1) + b_2))
    expert_t = argmax(probs_t + balance),   p_t = probs_t[expert_t]

Source: ZAYA1, arXiv 2511.17127.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..dispatch import dispatched, takes_triton
from . import reference
from .reference import RouterWeights

__all__ = ["RouterWeights", "route", "route_top1"]


route = dispatched(reference.route, wide=False)


def route_top1(
    x_TD: torch.Tensor, expert_T: torch.Tensor, weight_T: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor] = F.silu,
) -> torch.Tensor:  # fmt: skip
    """Returns out_TD; see `reference.route_top1`. Activations other than silu, and float64, take the reference."""
    silu = activation is F.silu or type(activation).__name__ in ("SiLU", "SiLUActivation")
    if silu and x_TD.dtype != torch.float64 and takes_triton(x_TD, weight_T, gate_up_E2FD, down_EDF):
        from . import triton as fast

        return fast.route_top1(x_TD, expert_T, weight_T, gate_up_E2FD, down_EDF)
    return reference.route_top1(x_TD, expert_T, weight_T, gate_up_E2FD, down_EDF, activation)
