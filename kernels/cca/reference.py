"""Plain CCA convolutions and q/k normalisation. Legend: T rows, A ancestors (time0 + time1 - 1), C channels."""

from __future__ import annotations

import torch


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
        depthwise_weight: [C, 1, time0] as `torch.nn.Conv1d` keeps it (the last tap is the row itself).
        depthwise_bias, grouped_bias: [C].
        grouped_weight: [C, C / groups, time1].
    """
    channels, width, time1 = grouped_weight.shape
    time0, groups = depthwise_weight.shape[-1], channels // width
    taps_JC = depthwise_weight[:, 0].flip(-1).t()
    y_THC = depthwise_bias
    for j in range(time0):
        y_THC = torch.addcmul(y_THC, x_TAC[:, j : j + time1], taps_JC[j])
    y_GTE = y_THC.unflatten(-1, (groups, width)).permute(2, 0, 1, 3).flatten(2)
    w_GEO = grouped_weight.flip(-1).view(groups, width, width, time1).permute(0, 3, 2, 1).flatten(1, 2)
    out_GTO = torch.baddbmm(grouped_bias.view(groups, 1, width).to(y_GTE.dtype), y_GTE, w_GEO.to(y_GTE.dtype))
    return out_GTO.transpose(0, 1).flatten(1)


def normalise(x_THD: torch.Tensor) -> torch.Tensor:
    """Scales each head to length sqrt(D); a zero vector stays zero."""
    length = x_THD.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x_THD.dtype).eps)
    return x_THD * (x_THD.shape[-1] ** 0.5 / length)
