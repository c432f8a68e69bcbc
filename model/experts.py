"""ZAYA's mixture of experts: a router with a state carried from layer to layer (EDA), top-1 experts, a skip expert.

Parameter names are those of `transformers.ZayaForCausalLM`. Legend: T rows, D hidden, E experts, P router width.
"""

from __future__ import annotations

import torch
from torch import nn

from ..kernels.experts import RouterWeights, route, route_top1
from ..kernels.residual import rms_norm
from .rotary import activation


class RMSNorm(nn.Module):
    """RMS norm with a learned weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class RouterMLP(nn.Module):
    """Router state to expert logits (`gate.router_mlp`)."""

    def __init__(self, size: int, classes: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(size, eps)
        self.fc1, self.fc2 = nn.Linear(size, size), nn.Linear(size, size)
        self.out_proj = nn.Linear(size, classes, bias=False)


class Router(nn.Module):
    """Chooses one of E experts or the skip expert (number E) per row (`mlp.gate`)."""

    def __init__(self, config, layer: int) -> None:
        super().__init__()
        width, classes = config.router_hidden_size, config.num_experts + 1
        self.down_proj = nn.Linear(config.hidden_size, width)
        self.router_states_scale = nn.Parameter(torch.ones(width)) if layer else None
        self.router_mlp = RouterMLP(width, classes, config.rms_norm_eps)
        self.balancing_biases = nn.Buffer(torch.zeros(classes))
        self.balancing_biases[-1] = -1.0

    def forward(
        self, x_TD: torch.Tensor, state_TP: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns expert_T, its probability weight_T, the router state for the next layer, and probs_TE of all classes.

        The balancing biases take part in the choice, never in the weight.
        """
        mlp = self.router_mlp
        weights = RouterWeights(
            self.down_proj.weight, self.down_proj.bias, self.router_states_scale, mlp.norm.weight, mlp.fc1.weight,
            mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias, mlp.out_proj.weight, self.balancing_biases,
        )  # fmt: skip
        return route(x_TD, state_TP, weights, mlp.norm.eps)


class Experts(nn.Module):
    """Expert weights (`mlp.experts`)."""

    def __init__(self, config) -> None:
        super().__init__()
        shape = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(shape[0], 2 * shape[1], shape[2]))
        self.down_proj = nn.Parameter(torch.empty(shape[0], shape[2], shape[1]))
        self.activation = activation(config.hidden_act)

    def forward(self, x_TD: torch.Tensor, expert_T: torch.Tensor, weight_T: torch.Tensor) -> torch.Tensor:
        return route_top1(x_TD, expert_T, weight_T, self.gate_up_proj, self.down_proj, self.activation)


class MixtureOfExperts(nn.Module):
    """Router and experts of one layer (`mlp`)."""

    def __init__(self, config, layer: int) -> None:
        super().__init__()
        self.gate, self.experts = Router(config, layer), Experts(config)

    def forward(
        self, x_TD: torch.Tensor, state_TP: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns out_TD, the router state, expert_T and probs_TE."""
        expert_T, weight_T, state_TP, probs_TE = self.gate(x_TD, state_TP)
        return self.experts(x_TD, expert_T, weight_T), state_TP, expert_T, probs_TE
