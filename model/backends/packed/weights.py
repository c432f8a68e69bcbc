"""The weights of `PackedBackend`: folded from those of a policy and laid out for `kernels/linear/numba.py`.

The weight and size of a norm are folded into the matrix after it; the two convolutions become one over all ancestors; residual
scales and biases go into the matrix before them.

Legend: as in `cca` and `experts`; N = H + G heads, A ancestors, F inner size of an expert, P panels, W columns of a panel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ....kernels.linear.numba import pack, products
from ...cca import Projection

if TYPE_CHECKING:
    from ...policy import Layer


class PackedLayer(NamedTuple):
    """One layer, folded; or all L layers, each array with L in front. float32 and contiguous but for `window` and `states`. What
    rows are multiplied by lies in panels."""

    window: np.ndarray  # int64: number of the layer's window
    in_floor: np.ndarray
    projection_PDW: np.ndarray  # q and k, delayed value, current value
    projection_bias: np.ndarray
    before: np.ndarray  # delayed value before the document
    convolution_NPDW: np.ndarray  # summed: the features of all A ancestors
    convolution_bias_NO: np.ndarray
    temperature_N: np.ndarray
    output_PDW: np.ndarray
    output_bias: np.ndarray
    attention_residual_D: np.ndarray
    post_floor: np.ndarray
    router_down_PDW: np.ndarray
    router_down_bias: np.ndarray
    router_scale: np.ndarray
    states: np.ndarray  # int64: features of the router's state that are taken from the layer below, all or none
    router_floor: np.ndarray
    fc1_PDW: np.ndarray
    fc1_bias: np.ndarray
    fc2_PDW: np.ndarray
    fc2_bias: np.ndarray
    router_out_PDW: np.ndarray
    balance_C: np.ndarray
    gate_up_EPDW: np.ndarray  # D to 2F of each expert
    down_EPFW: np.ndarray  # F to D
    mlp_bias: np.ndarray
    mlp_residual_D: np.ndarray


def fold_layers(layers: Iterable[Layer], windows: Sequence[str]) -> PackedLayer:
    """The weights of all layers. `windows`: layer types, in the order of their windows."""
    return PackedLayer(*map(np.stack, zip(*(_fold(layer, windows.index(layer.self_attn.kind)) for layer in layers), strict=True)))


def turned(matrix: torch.Tensor) -> torch.Tensor:
    """[..., out, in] as [..., in, out], contiguous."""
    return matrix.mT.contiguous()


def _array(value: torch.Tensor) -> np.ndarray:
    """A copy, whatever becomes of the policy."""
    return value.detach().numpy().copy()


def floor(size: int, eps: float) -> np.ndarray:
    """What RMS norm's eps is beside a sum of squares."""
    return np.array(size * eps, np.float32)


def _fold(layer: Layer, window: int) -> PackedLayer:
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
        window=np.array(window),
        in_floor=floor(hidden, layer.input_layernorm.eps),
        projection_PDW=pack(turned(weight * layer.input_layernorm.weight * hidden**0.5)),
        projection_bias=_array(weight.new_zeros(len(weight)) if bias is None else bias),
        before=_array(weight.new_zeros(len(delayed.weight)) if delayed.bias is None else delayed.bias),
        convolution_NPDW=convolution,
        convolution_bias_NO=convolution_bias,
        # Queries carry the scale of their scores, size ** -0.5.
        temperature_N=_array(torch.cat([weight.new_ones(query_heads), attention.qk_norm.temp * size**0.5])),
        output_PDW=pack(turned(attention.o_proj.weight * turn_hidden[:, None])),
        output_bias=_array(
            (hidden_bias if own_bias is None else hidden_bias + own_bias) * turn_hidden + residual_bias * turn_residual
        ),
        attention_residual_D=_array(turn_residual),
        post_floor=floor(hidden, layer.post_attention_layernorm.eps),
        router_down_PDW=pack(turned(router.down_proj.weight * norm)),
        router_down_bias=_array(router.down_proj.bias),
        router_scale=_array(weight.new_zeros(width) if router.router_states_scale is None else router.router_states_scale),
        states=np.array(0 if router.router_states_scale is None else width),
        router_floor=floor(width, mlp.norm.eps),
        fc1_PDW=pack(turned(mlp.fc1.weight * mlp.norm.weight * width**0.5)),
        fc1_bias=_array(mlp.fc1.bias),
        fc2_PDW=pack(turned(mlp.fc2.weight)),
        fc2_bias=_array(mlp.fc2.bias),
        router_out_PDW=pack(turned(mlp.out_proj.weight)),
        balance_C=_array(router.balancing_biases),
        gate_up_EPDW=pack(turned(gate_up)),
        down_EPFW=pack(turned(experts.down_proj * mlp_hidden[:, None])),
        mlp_bias=_array(mlp_bias * mlp_hidden + mlp_residual_bias * mlp_residual),
        mlp_residual_D=_array(mlp_residual),
    )


def _projection(layer: Layer) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows: q and k, delayed value, current value."""
    project = layer.self_attn.qkv_proj
    layers = project.q_proj, project.k_proj, project.v_proj_delayed, project.v_proj_current
    weights: list[torch.Tensor] = [each.weight for each in layers]
    biases: list[torch.Tensor] = [each.bias for each in layers if each.bias is not None]
    return torch.cat(weights), torch.cat(biases) if biases else None


def _convolution(project: Projection) -> tuple[np.ndarray, np.ndarray]:
    """Both convolutions as one product per head over all ancestors, in panels, and its bias."""
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
    bias_N1D = depthwise.bias.unflatten(0, (heads, size)).repeat_interleave(time1, 1)[:, None]
    through_N1O = np.empty((heads, 1, size), np.float32)
    products(_array(bias_N1D), pack(turned(w_NOEH.flatten(2))), through_N1O)
    return pack(whole_NAEO.flatten(1, 2)), _array(grouped.bias).reshape(heads, size) + through_N1O[:, 0]
