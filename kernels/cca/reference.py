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
    time0, time1 = depthwise_weight.shape[-1], grouped_weight.shape[-1]
    channels, width = grouped_weight.shape[:2]
    groups = channels // width
    taps_JC = depthwise_weight[:, 0].flip(-1).t()
    # unbind, not slices: the backward of a slice fills a whole tensor with zeros.
    x = x_TAC.unbind(1)
    y = [depthwise_bias + sum(x[h + j] * taps_JC[j] for j in range(time0)) for h in range(time1)]
    y_GTF = torch.cat([y_TC.unflatten(-1, (groups, width)) for y_TC in y], dim=-1).transpose(0, 1)
    w_GFO = grouped_weight.flip(-1).view(groups, width, width, time1).permute(0, 3, 2, 1).flatten(1, 2)
    out_GTO = torch.bmm(y_GTF, w_GFO.to(y_GTF.dtype))
    return out_GTO.transpose(0, 1).flatten(1) + grouped_bias


def normalise(x_THD: torch.Tensor) -> torch.Tensor:
    """Scales each head to length sqrt(D); a zero vector stays zero."""
    length = x_THD.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x_THD.dtype).eps)
    return x_THD * (x_THD.shape[-1] ** 0.5 / length)
