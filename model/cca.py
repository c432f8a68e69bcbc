"""Compressed convolutional attention of one layer: its parameters, and the order of its steps (arXiv 2510.04476).

Invariants:
- Parameter names are those of `transformers.ZayaForCausalLM`.
- A plan attends: `plan.PlainPlan` in torch, which has gradients, `paged.PagedPlan` through kernels on the cache's pages.

Legend: T rows, H query heads, G key heads, D head size, C = (H + G) * D channels, W = G * D / 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..kernels.cca import CCAInputs, CCAWeights, taps_apart
from ..kernels.linear import linear
from .linear import Linear
from .plan import Plan
from .state import SequenceState


class Projection(nn.Module):
    """Hidden states to queries, keys and values (`self_attn.qkv_proj`)."""

    def __init__(self, config, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        q, kv, bias = self.heads * self.head_dim, self.kv_heads * self.head_dim, config.attention_bias
        self.q_proj = Linear(config.hidden_size, q, bias=bias)
        self.k_proj = Linear(config.hidden_size, kv, bias=bias)
        self.v_proj_current = Linear(config.hidden_size, kv // 2, bias=bias)
        self.v_proj_delayed = Linear(config.hidden_size, kv // 2, bias=bias)
        self.conv_qk_depthwise = nn.Conv1d(q + kv, q + kv, config.cca_time0, groups=q + kv)
        self.conv_qk_grouped = nn.Conv1d(q + kv, q + kv, config.cca_time1, groups=self.heads + self.kv_heads)
        self._packed: tuple[torch.Tensor, torch.Tensor | None] | None = None

    @property
    def _projections(self) -> tuple[Linear, Linear, Linear, Linear]:
        return self.q_proj, self.k_proj, self.v_proj_current, self.v_proj_delayed

    @torch.no_grad()
    def pack(self) -> None:
        """Move the parameters of the four projections side by side in memory, so that one product computes all four without
        gradients, and the taps of the convolutions apart. They stay parameters of their own; values copied into them are seen.
        A move to another device or dtype undoes this. Otherwise a second call moves nothing, because captured steps read the
        parameters where they lie."""
        if self._in_place():
            return

        def side_by_side(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
            whole = torch.cat([parameter.data for parameter in parameters])
            for parameter, part in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
                parameter.data = part
            return whole

        biases = [layer.bias for layer in self._projections if layer.bias is not None]
        weight = side_by_side([layer.weight for layer in self._projections])
        self._packed = weight, side_by_side(biases) if biases else None
        for convolution in (self.conv_qk_depthwise, self.conv_qk_grouped):
            convolution.weight.data = taps_apart(convolution.weight.data)

    def _in_place(self) -> bool:
        """Whether the parameters still lie where `pack` moved them."""
        if self._packed is None:
            return False
        weight, first = self._packed[0], self.q_proj.weight
        return first.data_ptr() == weight.data_ptr() and first.dtype == weight.dtype

    def _whole(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """The joined weight that `pack` made, if the parameters still lie in it."""
        if torch.is_grad_enabled() or not self._in_place():
            return None
        return self._packed

    def forward(self, hidden_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns x_TC, the q/k projections, and the halves of the values: current_TW and delayed_TW."""
        whole = self._whole()
        if whole is not None:
            width = self.kv_heads * self.head_dim // 2
            x_TC, current_TW, delayed_TW = linear(hidden_TD, *whole).split(
                [len(whole[0]) - 2 * width, width, width], dim=-1
            )
            return x_TC, current_TW, delayed_TW
        x_TC = torch.cat([self.q_proj(hidden_TD), self.k_proj(hidden_TD)], dim=-1)
        return x_TC, self.v_proj_current(hidden_TD), self.v_proj_delayed(hidden_TD)

    def weights(self, temperature_G: torch.Tensor) -> CCAWeights:
        """Everything CCA needs beside the projections."""
        depthwise, grouped = self.conv_qk_depthwise, self.conv_qk_grouped
        assert depthwise.bias is not None and grouped.bias is not None
        return CCAWeights(
            depthwise.weight, depthwise.bias, grouped.weight, grouped.bias, temperature_G, self.v_proj_delayed.bias
        )


class QKNorm(nn.Module):
    """Per-key-head temperature of the normalised keys (`self_attn.qk_norm`)."""

    def __init__(self, config) -> None:
        super().__init__()
        self.temp = nn.Parameter(torch.ones(config.num_key_value_heads))


class Attention(nn.Module):
    """CCA attention of one layer (`self_attn`)."""

    def __init__(self, config, layer: int) -> None:
        super().__init__()
        self.layer, self.kind, self.scale = layer, config.layer_types[layer], config.head_dim**-0.5
        self.o_proj = Linear(
            config.num_attention_heads * config.head_dim, config.hidden_size, bias=config.attention_bias
        )
        self.qkv_proj = Projection(config, layer)
        self.qk_norm = QKNorm(config)

    def forward(
        self, hidden_TD: torch.Tensor, plan: Plan, rope: tuple[torch.Tensor, torch.Tensor], state: SequenceState | None
    ) -> torch.Tensor:
        x_TC, current_TW, delayed_TW = self.qkv_proj(hidden_TD)
        cos_TP, sin_TP = rope
        inputs = CCAInputs(x_TC, current_TW, delayed_TW, self.qkv_proj.weights(self.qk_norm.temp), cos_TP, sin_TP)
        out_THD = plan.attend(self.layer, self.kind, inputs, self.scale, state)
        return self.o_proj(out_THD.flatten(1))
