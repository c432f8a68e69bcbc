"""Plain CCA. Legend: T rows, A ancestors (time0 + time1 - 1), C channels, H query heads, G key heads, D head size, P rotary
features, W width of the delayed value."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .places import NOTHING, Places, Pools


class CCAWeights(NamedTuple):
    """Weights of one layer, as ZAYA keeps them.

    Attributes:
        depthwise_weight: [C, 1, time0] as `torch.nn.Conv1d` keeps it (the last tap is the row itself).
        depthwise_bias, grouped_bias: [C].
        grouped_weight: [C, C / groups, time1].
        temperature_G: of the normalised keys.
        before_W: delayed value of the token before a document (the bias of its projection); None for zero.
    """

    depthwise_weight: torch.Tensor
    depthwise_bias: torch.Tensor
    grouped_weight: torch.Tensor
    grouped_bias: torch.Tensor
    temperature_G: torch.Tensor
    before_W: torch.Tensor | None


class CCAInputs(NamedTuple):
    """What CCA turns into queries, keys and values.

    Attributes:
        x_TC: q/k projections. current_TW, delayed_TW: the two halves of the values.
        cos_TP, sin_TP: RoPE tables, whose halves are equal.
    """

    x_TC: torch.Tensor
    current_TW: torch.Tensor
    delayed_TW: torch.Tensor
    weights: CCAWeights
    cos_TP: torch.Tensor
    sin_TP: torch.Tensor


def taps_apart(weight: torch.Tensor) -> torch.Tensor:
    """The same weight of a convolution, [out, in, taps], copied into memory where its taps lie outermost: a kernel multiplies by
    one tap at a time, and can then load it in whole lines. A weight that lies so already is returned as it is."""
    return weight if weight.permute(2, 0, 1).is_contiguous() else torch.stack(weight.unbind(-1)).permute(1, 2, 0)


def convolve(
    x_TAC: torch.Tensor,
    depthwise_weight: torch.Tensor,
    depthwise_bias: torch.Tensor,
    grouped_weight: torch.Tensor,
    grouped_bias: torch.Tensor,
) -> torch.Tensor:
    """Returns out_TC.

    Args:
        x_TAC: projections of each row and its ancestors, nearest first.
        Weights: see `CCAWeights`.
    """
    channels, width, time1 = grouped_weight.shape
    time0, groups = depthwise_weight.shape[-1], channels // width
    taps_JC = depthwise_weight[:, 0].flip(-1).t()
    y_THC = depthwise_bias
    for j in range(time0):
        y_THC = torch.addcmul(y_THC, x_TAC[:, j : j + time1], taps_JC[j])
    y_GTE = y_THC.unflatten(-1, (groups, width)).permute(2, 0, 1, 3).flatten(2)
    w_GEO = grouped_weight.flip(-1).reshape(groups, width, width, time1).permute(0, 3, 2, 1).flatten(1, 2)
    out_GTO = torch.baddbmm(grouped_bias.view(groups, 1, width).to(y_GTE.dtype), y_GTE, w_GEO.to(y_GTE.dtype))
    return out_GTO.transpose(0, 1).flatten(1)


def normalise(x_THD: torch.Tensor) -> torch.Tensor:
    """Scales each head to length sqrt(D); a zero vector stays zero."""
    length = x_THD.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x_THD.dtype).eps)
    return x_THD * (x_THD.shape[-1] ** 0.5 / length)


def rotate(x_THD: torch.Tensor, cos_TP: torch.Tensor, sin_TP: torch.Tensor) -> torch.Tensor:
    """Partial RoPE on the first P of D features."""
    half = cos_TP.shape[-1] // 2
    left, right, kept = x_THD[..., :half], x_THD[..., half : 2 * half], x_THD[..., 2 * half :]
    # Both halves of the tables are equal.
    cos, sin = cos_TP[:, None, :half], sin_TP[:, None, :half]
    return torch.cat([left * cos - right * sin, right * cos + left * sin, kept], dim=-1)


def mix(
    x_TAC: torch.Tensor, weights: CCAWeights, cos_TP: torch.Tensor, sin_TP: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns q_THD, k_TGD.

    Args:
        x_TAC: q/k projections (query heads, then key heads) of each row and its ancestors, nearest first.
        cos_TP, sin_TP: RoPE tables, whose halves are equal.
    """
    kv_heads = len(weights.temperature_G)
    size = weights.grouped_weight.shape[1]
    heads = x_TAC.shape[-1] // size - kv_heads
    group = heads // kv_heads
    mixed_THD = convolve(x_TAC, *weights[:4]).unflatten(-1, (heads + kv_heads, size))
    q_TC, k_TC = x_TAC[:, 0].split([heads * size, kv_heads * size], dim=-1)
    q_TGUD, k_TG1D = q_TC.unflatten(-1, (kv_heads, group, size)), k_TC.unflatten(-1, (kv_heads, 1, size))
    q_THD = torch.add(mixed_THD[:, :heads], (q_TGUD + k_TG1D).flatten(1, 2), alpha=0.5)
    # A sum over the views of so few heads is several times as fast as torch's mean over a middle dimension.
    k_TGD = torch.add(mixed_THD[:, heads:], k_TG1D[:, :, 0] + sum(q_TGUD.unbind(2)) / group, alpha=0.5)
    k_TGD = normalise(k_TGD) * weights.temperature_G[:, None]
    return rotate(normalise(q_THD), cos_TP, sin_TP), rotate(k_TGD, cos_TP, sin_TP)


def look_back(
    x_TC: torch.Tensor, delayed_TW: torch.Tensor, before_W: torch.Tensor | None, source_TA: torch.Tensor, pools: Pools | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x_TAC of each row and its ancestors, and the parent's delayed value previous_TW. Differentiable.

    Args:
        before_W: as in `CCAWeights`. source_TA: as in `Places`.
        pools: None without a cache; then no source is a tail entry.
    """
    source_TA, outside = source_TA.long(), len(x_TC)
    place_TA = torch.where(source_TA < 0, outside, source_TA)
    nothing_1W = delayed_TW.new_zeros(1, delayed_TW.shape[1]) if before_W is None else before_W[None].to(delayed_TW.dtype)
    x_TAC = torch.cat([x_TC, x_TC.new_zeros(1, x_TC.shape[1])]).index_select(0, place_TA.flatten()).unflatten(0, place_TA.shape)
    previous_TW = torch.cat([delayed_TW, nothing_1W]).index_select(0, place_TA[:, 1])
    if pools is not None:
        in_tail_TA1, entry_TA = (source_TA < NOTHING)[..., None], (-2 - source_TA).clamp_min(0)
        x_TAC = torch.where(in_tail_TA1, pools.x[entry_TA], x_TAC)
        previous_TW = torch.where(in_tail_TA1[:, 1], pools.delayed[entry_TA[:, 1]], previous_TW)
    return x_TAC, previous_TW


def queries_keys_values(
    inputs: CCAInputs, source_TA: torch.Tensor, pools: Pools | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q_THD, k_TGD, v_TGD of a pack. Differentiable, and nothing is kept.

    Args: as of `cca` and `look_back`.
    """
    x_TC, current_TW, delayed_TW, weights, cos_TP, sin_TP = inputs
    x_TAC, previous_TW = look_back(x_TC, delayed_TW, weights.before_W, source_TA, pools)
    q_THD, k_TGD = (y.to(x_TC.dtype) for y in mix(x_TAC, weights, cos_TP, sin_TP))
    return q_THD, k_TGD, torch.cat([current_TW, previous_TW], dim=-1).unflatten(-1, k_TGD.shape[1:])


def cca(
    inputs: CCAInputs, places: Places, pools: Pools | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of a pack, and its rows kept in the cache: q_THD, k_TGD, v_TGD.

    Args:
        pools: None without a cache; then no source is a tail entry and nothing is kept.
    """
    q_THD, k_TGD, v_TGD = queries_keys_values(inputs, places.source_TA, pools)
    if pools is not None:
        kept, tail = (places.write_T != NOTHING).nonzero()[:, 0], (places.tail_T != NOTHING).nonzero()[:, 0]
        for pool, row, index, at in (
            (pools.k, k_TGD, kept, places.write_T), (pools.v, v_TGD, kept, places.write_T),
            (pools.x, inputs.x_TC, tail, places.tail_T), (pools.delayed, inputs.delayed_TW, tail, places.tail_T),
        ):  # fmt: skip
            pool.index_copy_(0, at[index].long(), row[index])
    return q_THD, k_TGD, v_TGD
