"""Plain grouped experts: rows sorted by expert, one pair of matrix products per expert that has rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


def route_top1(
    x_TD: torch.Tensor,
    expert_T: torch.Tensor,
    weight_T: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor] = F.silu,
) -> torch.Tensor:
    """Returns out_TD.

    Args:
        expert_T: int64 expert of each row; E (the number of experts) means skip.
        weight_T: router probability of the chosen expert.
        gate_up_E2FD: gate rows, then up rows.
    """
    experts = gate_up_E2FD.shape[0]
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
