"""The weights of `PackedForward`, folded once from a policy's own.

Norms' weights and sizes go into the matrices after them, the two convolutions into one over all ancestors, the means of queries
and keys into the projection, residual scales and biases into the matrices before them.

Legend: as in `cca` and `experts`; N = H + G heads, A ancestors, F inner size of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..cca import Projection
from ..policy import Layer


@dataclass
class PackedLayer:
    """One layer, folded. Matrices are [in, out] and contiguous: products of few rows with them take half the time that those
    with their transposes do."""

    kind: str
    in_floor: np.float32
    projection: torch.Tensor  # q and k, delayed value, current value, then q and k with their means
    projection_bias: torch.Tensor
    before_W: torch.Tensor  # delayed value before the document
    convolution_N_AE_O: torch.Tensor
    convolution_bias_N1O: torch.Tensor
    temperature_N1: torch.Tensor
    output: torch.Tensor
    output_bias: torch.Tensor
    attention_residual_D: torch.Tensor
    post_floor: np.float32
    router_down: torch.Tensor
    router_down_bias: torch.Tensor
    router_scale: torch.Tensor  # empty in a layer that takes no state
    router_floor: np.float32
    fc1: torch.Tensor
    fc1_bias: torch.Tensor
    fc2: torch.Tensor
    fc2_bias: torch.Tensor
    router_out: torch.Tensor
    balance_C: torch.Tensor
    gate_up_E: list[torch.Tensor]  # [D, 2F] of each expert
    down_E: list[torch.Tensor]  # [F, D]
    mlp_bias: torch.Tensor
    mlp_residual_D: torch.Tensor


def turned(matrix: torch.Tensor) -> torch.Tensor:
    """[..., out, in] as [..., in, out], contiguous."""
    return matrix.mT.contiguous()


def floor(size: int, eps: float) -> np.float32:
    """What RMS norm's eps is beside a sum of squares."""
    return np.float32(size * eps)


def fold_layer(layer: Layer) -> PackedLayer:
    """One layer's weights."""
    attention, router, experts = layer.self_attn, layer.mlp.gate, layer.mlp.experts
    mlp = router.router_mlp
    weight, bias = _projection(layer)
    convolution, convolution_bias = _convolution(attention.qkv_proj)
    turn_hidden, hidden_bias, turn_residual, residual_bias = layer.post_attention_residual_scale.scales
    mlp_hidden, mlp_bias, mlp_residual, mlp_residual_bias = layer.post_mlp_residual_scale.scales
    own_bias = attention.o_proj.bias
    hidden, width = layer.input_layernorm.weight.numel(), mlp.norm.weight.numel()
    norm = layer.post_attention_layernorm.weight * hidden**0.5
    delayed = attention.qkv_proj.v_proj_delayed
    gate_up = experts.gate_up_proj * norm
    query_heads, size = attention.qkv_proj.heads, attention.qkv_proj.head_dim
    return PackedLayer(
        kind=attention.kind,
        in_floor=floor(hidden, layer.input_layernorm.eps),
        projection=turned(weight * layer.input_layernorm.weight * hidden**0.5),
        projection_bias=weight.new_zeros(len(weight)) if bias is None else bias,
        before_W=weight.new_zeros(1, len(delayed.weight)) if delayed.bias is None else delayed.bias[None].clone(),
        convolution_N_AE_O=convolution,
        convolution_bias_N1O=convolution_bias,
        # Queries carry the scale of their scores, size ** -0.5.
        temperature_N1=torch.cat([weight.new_ones(query_heads), attention.qk_norm.temp * size**0.5])[:, None],
        output=turned(attention.o_proj.weight * turn_hidden[:, None]),
        output_bias=(hidden_bias if own_bias is None else hidden_bias + own_bias) * turn_hidden
        + residual_bias * turn_residual,
        attention_residual_D=turn_residual.clone(),
        post_floor=floor(hidden, layer.post_attention_layernorm.eps),
        router_down=turned(router.down_proj.weight * norm),
        router_down_bias=router.down_proj.bias.clone(),
        router_scale=weight.new_zeros(0) if router.router_states_scale is None else router.router_states_scale.clone(),
        router_floor=floor(width, mlp.norm.eps),
        fc1=turned(mlp.fc1.weight * mlp.norm.weight * width**0.5),
        fc1_bias=mlp.fc1.bias.clone(),
        fc2=turned(mlp.fc2.weight),
        fc2_bias=mlp.fc2.bias.clone(),
        router_out=turned(mlp.out_proj.weight),
        balance_C=router.balancing_biases.clone(),
        gate_up_E=list(turned(gate_up)),
        down_E=list(turned(experts.down_proj * mlp_hidden[:, None])),
        mlp_bias=mlp_bias * mlp_hidden + mlp_residual_bias * mlp_residual,
        mlp_residual_D=mlp_residual.clone(),
    )


def _projection(layer: Layer) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows: q and k, delayed value, current value, and half of q + k and of k + mean q, as CCA adds them."""
    project = layer.self_attn.qkv_proj
    groups, size = project.kv_heads, project.head_dim

    def whole(q: torch.Tensor, k: torch.Tensor, delayed: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
        q_GUO, k_G1O = q.unflatten(0, (groups, -1, size)), k.unflatten(0, (groups, 1, size))
        means = (q_GUO + k_G1O).flatten(0, 2) / 2, (k_G1O[:, 0] + q_GUO.mean(1)).flatten(0, 1) / 2
        return torch.cat([q, k, delayed, current, *means])

    layers = project.q_proj, project.k_proj, project.v_proj_delayed, project.v_proj_current
    biases = [each.bias for each in layers if each.bias is not None]
    return whole(*(each.weight for each in layers)), whole(*biases) if biases else None


def _convolution(project: Projection) -> tuple[torch.Tensor, torch.Tensor]:
    """Both convolutions as one product per head over all ancestors, and its bias."""
    depthwise, grouped = project.conv_qk_depthwise, project.conv_qk_grouped
    assert depthwise.bias is not None and grouped.bias is not None
    heads, size = project.heads + project.kv_heads, project.head_dim
    w_NOEH = grouped.weight.flip(-1).unflatten(0, (heads, size))
    taps_NEJ = depthwise.weight[:, 0].flip(-1).unflatten(0, (heads, size))
    time0, time1 = taps_NEJ.shape[-1], w_NOEH.shape[-1]
    whole_NAEO = w_NOEH.new_zeros(heads, time0 + time1 - 1, size, size)
    for h in range(time1):
        for j in range(time0):
            whole_NAEO[:, h + j] += (w_NOEH[..., h] * taps_NEJ[:, None, :, j]).transpose(1, 2)
    bias_NO = grouped.bias.unflatten(0, (heads, size)) + torch.einsum(
        "noeh,ne->no", w_NOEH, depthwise.bias.unflatten(0, (heads, size))
    )
    return whole_NAEO.flatten(1, 2), bias_NO[:, None]
