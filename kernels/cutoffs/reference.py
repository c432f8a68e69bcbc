"""Cut-offs by a sort of the vocabulary.

Legend: S sequences, R rows of each, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

_WEIGHT_BITS, _SUM_BITS = 44, 63
"""Of the largest weight, and of the largest sum of weights."""


class Edges(NamedTuple):
    """Where the support of each row ends.

    Attributes:
        value_SR: logits over the temperature that are above it are inside; in the logits' precision or float32, the wider one.
        last_SR: int64, of those that equal it the ones up to this token id are inside.
        logmass_SR: float32, log of the probability inside the support.
    """

    value_SR: torch.Tensor
    last_SR: torch.Tensor
    logmass_SR: torch.Tensor


def edges(
    logits_SRV: torch.Tensor, temperature_S: torch.Tensor, top_k_S: torch.Tensor, top_p_S: torch.Tensor, min_p_S: torch.Tensor
) -> Edges:
    """The support that the cut-offs leave of each row; never empty.

    Args:
        logits_SRV: the last dimension lies side by side in memory.
        temperature_S, top_p_S, min_p_S: float64; top_k_S: int64. 0 as temperature counts as 1. Values that cut nothing: top_k 0,
            top_p 1, min_p 0.
    """
    x_SRV, vocab_size = scaled(logits_SRV, temperature_S), logits_SRV.shape[-1]
    top_k_S11, top_p_S11, min_p_S11 = (each[:, None, None] for each in (top_k_S, top_p_S, min_p_S))
    value_SRV = _descending(x_SRV)
    top_SR1 = value_SRV[..., :1]
    weight_SRV = whole_weights(value_SRV, top_SR1)
    keep_SRV = torch.arange(vocab_size, device=x_SRV.device) < torch.where(top_k_S11 > 0, top_k_S11, vocab_size)
    total_SR1 = torch.where(keep_SRV, weight_SRV, 0).sum(-1, keepdim=True)
    bound_SR1 = (top_p_S11 * total_SR1).ceil().clamp_min(1).long()
    keep_SRV = keep_SRV & ((weight_SRV.cumsum(-1) - weight_SRV < bound_SR1) | (top_p_S11 >= 1))
    keep_SRV &= value_SRV >= top_SR1 + min_p_S11.log().to(x_SRV.dtype)
    count_SR1 = keep_SRV.sum(-1, keepdim=True)
    edge_SR1 = value_SRV.gather(-1, (count_SR1 - 1).clamp_min(0))
    mass_SR = torch.where(keep_SRV, weight_SRV, 0).sum(-1) / weight_SRV.sum(-1)
    tied_SRV = x_SRV == edge_SR1
    room_SR1 = count_SR1 - (x_SRV > edge_SR1).sum(-1, keepdim=True)
    last_SR = torch.full(x_SRV.shape[:2], vocab_size, device=x_SRV.device)
    if x_SRV.device.type != "cpu" or bool((tied_SRV.sum(-1, keepdim=True) > room_SR1).any()):  # rare; a CPU looks
        last_SR = (tied_SRV.cumsum(-1) < room_SR1).sum(-1)
    return Edges(edge_SR1[..., 0], last_SR, mass_SR.log().float())


def cut_(logits_SRV: torch.Tensor, temperature_S: torch.Tensor, found: Edges) -> None:
    """Make the logits outside the support -inf, in place."""
    logits_SRV.masked_fill_(~inside(scaled(logits_SRV, temperature_S), found), -torch.inf)


def inside(scaled_SRV: torch.Tensor, found: Edges) -> torch.Tensor:
    """Which tokens are in the support: bool[S, R, V]. `scaled_SRV`: logits over the temperature."""
    edge_SR1, token_V = found.value_SR[..., None], torch.arange(scaled_SRV.shape[-1], device=scaled_SRV.device)
    return (scaled_SRV > edge_SR1) | ((scaled_SRV == edge_SR1) & (token_V <= found.last_SR[..., None]))


def scaled(logits_SRV: torch.Tensor, temperature_S: torch.Tensor) -> torch.Tensor:
    """Logits over the temperature, float32 or wider."""
    wide_SRV = logits_SRV.to(torch.promote_types(logits_SRV.dtype, torch.float32))
    return wide_SRV / torch.where(temperature_S > 0, temperature_S, 1.0).to(wide_SRV.dtype)[:, None, None]


def whole_weights(x: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """The weights w, int64, of the numbers of a row, whose largest one is `top`."""
    return (torch.exp(x - top) * weight_scale(x.shape[-1])).long()


def weight_scale(vocab_size: int) -> float:
    """The largest weight: 2^44, or less where the sum over so many tokens would not fit into 63 bits."""
    return 2.0 ** min(_WEIGHT_BITS, _SUM_BITS - vocab_size.bit_length())


def _descending(x: torch.Tensor) -> torch.Tensor:
    """Values sorted along the last dimension, largest first. NumPy's sort of values alone is several times as fast as torch's,
    which also orders the indices."""
    if x.device.type != "cpu":
        return x.sort(-1, descending=True).values
    return torch.from_numpy(np.sort(x.numpy(), axis=-1)).flip(-1)
