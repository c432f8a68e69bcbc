"""Plain router and grouped experts: rows sorted by expert, one pair of matrix products per expert that has rows.

Legend: T rows, D hidden, F inner, P router width, E experts, C = E + 1 classes, the last of them skip.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..residual.reference import rms_norm


class RouterWeights(NamedTuple):
    """Weights of one layer's router, named as ZAYA's parameters below `mlp.gate`; matrices are [out, in].

    Attributes:
        router_states_scale: [P]; None in a layer that takes no state.
        balancing_biases: [C], added to the probabilities for the choice only.
    """

    down_proj_weight: torch.Tensor
    down_proj_bias: torch.Tensor
    router_states_scale: torch.Tensor | None
    norm_weight: torch.Tensor
    fc1_weight: torch.Tensor
    fc1_bias: torch.Tensor
    fc2_weight: torch.Tensor
    fc2_bias: torch.Tensor
    out_proj_weight: torch.Tensor
    balancing_biases: torch.Tensor


def route(
    x_TD: torch.Tensor, state_TP: torch.Tensor | None, weights: RouterWeights, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose an expert per row.

    Args:
        state_TP: the router state of the layer below; None in the first.
        eps: of the norm.
    Returns: expert_T (int64, E means skip), its probability weight_T, the router state for the next layer, probs_TC.
    """
    w = weights
    state = F.linear(x_TD, w.down_proj_weight, w.down_proj_bias)
    if state_TP is not None and w.router_states_scale is not None:
        state = state + state_TP * w.router_states_scale
    hidden_TP = F.gelu(F.linear(rms_norm(state, w.norm_weight, eps), w.fc1_weight, w.fc1_bias))
    hidden_TP = F.gelu(F.linear(hidden_TP, w.fc2_weight, w.fc2_bias))
    probs_TC = torch.softmax(F.linear(hidden_TP, w.out_proj_weight), dim=-1)
    expert_T = (probs_TC.detach() + w.balancing_biases).argmax(dim=-1)
    return expert_T, probs_TC.gather(1, expert_T[:, None])[:, 0], state, probs_TC


def route_top1(
    x_TD: torch.Tensor, expert_T: torch.Tensor, weight_T: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor] = F.silu,
) -> torch.Tensor:  # fmt: skip
    """Returns out_TD.

    Args:
        expert_T: int64 expert of each row; E (the number of experts) means skip.
        weight_T: router probability of the chosen expert.
        gate_up_E2FD: gate rows, then up rows.
    """
    experts = gate_up_E2FD.shape[0]
    if len(x_TD) == 1 and (only := int(expert_T)) < experts:
        gate, up = F.linear(x_TD, gate_up_E2FD[only]).chunk(2, dim=-1)
        return F.linear(activation(gate) * up, down_EDF[only]) * weight_T[:, None]
    order_T = torch.argsort(expert_T, stable=True)
    counts = torch.bincount(expert_T, minlength=experts + 1).tolist()
    chunks = []
    *grouped, skipped_TD = x_TD[order_T].split(counts)
    for expert, rows_TD in enumerate(grouped):
        if len(rows_TD):
            gate, up = F.linear(rows_TD, gate_up_E2FD[expert]).chunk(2, dim=-1)
            chunks.append(F.linear(activation(gate) * up, down_EDF[expert]))
    if len(skipped_TD):
        chunks.append(torch.zeros_like(skipped_TD))
    dtype = torch.promote_types(chunks[0].dtype, chunks[-1].dtype)
    sorted_out_TD = torch.cat([c.to(dtype) for c in chunks]) * weight_T[order_T, None]
    return torch.empty_like(sorted_out_TD).index_copy(0, order_T, sorted_out_TD)
