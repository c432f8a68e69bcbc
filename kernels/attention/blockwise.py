"""Attention over a long pack of rows without a mask or scores of its size: softmax summed up tile by tile.

    out_i = sum_j exp(scale * q_i . k_j - lse_i) v_j,   lse_i = log sum_j exp(scale * q_i . k_j)   over the j that i sees

Kept for the backward pass: q, k, v, out and lse; the scores of a tile are computed again, from which

    dv_j = sum_i p_ij do_i,   ds_ij = p_ij (do_i . v_j - do_i . out_i),   dq_i = scale sum_j ds_ij k_j,   dk_j likewise.

Memory grows with T; time with the pairs of tiles that see each other. Sources: online softmax, arXiv 1805.02867; recomputation
in the backward pass, arXiv 2205.14135.

Legend: T rows, H query heads, G key heads, U = H / G, D head size, I rows of a query tile, X = U * I, J rows of a key tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .ranges import RowRanges
from .reference import score_dtype

TILE = 512
"""Rows of a tile."""


@dataclass(frozen=True)
class Tiles:
    """The pairs of tiles to compute.

    Attributes:
        seen: per query tile, the key tiles it sees something of, each with whether it sees all of it.
    """

    ranges: RowRanges
    size: int
    seen: list[list[tuple[int, bool]]]

    @classmethod
    def of(cls, ranges: RowRanges, size: int = TILE) -> Tiles:
        """Sort the pairs of tiles."""
        some, whole = (x.tolist() for x in ranges.tiles(size))
        return cls(ranges, size, [[(j, whole[i][j]) for j, seen in enumerate(line) if seen] for i, line in enumerate(some)])

    def span(self, tile: int) -> slice:
        """Rows of a tile."""
        return slice(tile * self.size, min((tile + 1) * self.size, self.ranges.rows))


def attend_blockwise(
    q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor, tiles: Tiles, scale: float
) -> torch.Tensor:
    """Returns out_THD; every row must see at least one row. Differentiable once."""
    return _Blockwise.apply(q_THD, k_TGD, v_TGD, tiles, scale)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_THD, k_TGD, v_TGD, tiles, scale):
        with torch.autocast(q_THD.device.type, enabled=False):
            out_THD, lse_TH = _forward(q_THD, k_TGD, v_TGD, tiles, scale)
        ctx.save_for_backward(q_THD, k_TGD, v_TGD, out_THD, lse_TH)
        ctx.tiles, ctx.scale = tiles, scale
        return out_THD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_THD):
        q_THD, k_TGD, v_TGD, out_THD, lse_TH = ctx.saved_tensors
        with torch.autocast(grad_THD.device.type, enabled=False):
            grads = _backward(q_THD, k_TGD, v_TGD, out_THD, lse_TH, grad_THD, ctx.tiles, ctx.scale)
        return (*grads, None, None)


def _forward(
    q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor, tiles: Tiles, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    heads, groups = q_THD.shape[1], k_TGD.shape[1]
    wide = torch.promote_types(score_dtype(q_THD), torch.float32)
    out_THD = torch.empty_like(q_THD)
    lse_TH = torch.empty(q_THD.shape[:2], dtype=wide, device=q_THD.device)
    for i, seen in enumerate(tiles.seen):
        rows = tiles.span(i)
        q_GXD = _by_group(q_THD[rows], groups).to(wide) * scale
        most_GX = q_GXD.new_full(q_GXD.shape[:2], -torch.inf)
        sum_GX, total_GXD = torch.zeros_like(most_GX), torch.zeros_like(q_GXD)
        for columns, s_GXJ in _scores(q_GXD, k_TGD, tiles, rows, seen):
            higher_GX = torch.maximum(most_GX, s_GXJ.amax(-1))
            # A row may see nothing of this tile and of the tiles before it.
            base_GX = higher_GX.masked_fill(higher_GX == -torch.inf, 0.0)
            p_GXJ = s_GXJ.sub_(base_GX[..., None]).exp_()
            shrink_GX = (most_GX - base_GX).exp_()
            sum_GX = sum_GX * shrink_GX + p_GXJ.sum(-1)
            total_GXD = total_GXD * shrink_GX[..., None] + p_GXJ @ v_TGD[columns].transpose(0, 1).to(wide)
            most_GX = higher_GX
        out_THD[rows] = _by_row(total_GXD / sum_GX[..., None], heads).to(out_THD.dtype)
        lse_TH[rows] = _by_row((most_GX + sum_GX.log())[..., None], heads)[..., 0]
    return out_THD, lse_TH


def _backward(
    q_THD: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    out_THD: torch.Tensor,
    lse_TH: torch.Tensor,
    grad_THD: torch.Tensor,
    tiles: Tiles,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    heads, groups, wide = q_THD.shape[1], k_TGD.shape[1], lse_TH.dtype
    dq_THD = torch.empty_like(q_THD)
    dk_GTD, dv_GTD = (torch.zeros(x.transpose(0, 1).shape, dtype=wide, device=x.device) for x in (k_TGD, v_TGD))
    for i, seen in enumerate(tiles.seen):
        rows = tiles.span(i)
        q_GXD = _by_group(q_THD[rows], groups).to(wide) * scale
        do_GXD = _by_group(grad_THD[rows], groups).to(wide)
        lse_GX1 = _by_group(lse_TH[rows, :, None], groups)
        mean_GX1 = (do_GXD * _by_group(out_THD[rows], groups)).sum(-1, keepdim=True)
        dq_GXD = torch.zeros_like(q_GXD)
        for columns, s_GXJ in _scores(q_GXD, k_TGD, tiles, rows, seen):
            p_GXJ = s_GXJ.sub_(lse_GX1).exp_()
            dv_GTD[:, columns] += p_GXJ.transpose(1, 2) @ do_GXD
            ds_GXJ = (do_GXD @ v_TGD[columns].permute(1, 2, 0).to(wide)).sub_(mean_GX1).mul_(p_GXJ)
            dk_GTD[:, columns] += ds_GXJ.transpose(1, 2) @ q_GXD
            dq_GXD += ds_GXJ @ k_TGD[columns].transpose(0, 1).to(wide)
        dq_THD[rows] = _by_row(dq_GXD * scale, heads).to(dq_THD.dtype)
    return dq_THD, dk_GTD.transpose(0, 1).to(k_TGD.dtype), dv_GTD.transpose(0, 1).to(v_TGD.dtype)


def _scores(
    q_GXD: torch.Tensor, k_TGD: torch.Tensor, tiles: Tiles, rows: slice, seen: list[tuple[int, bool]]
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Key rows and s_GXJ, -inf where a row does not see; one tile after the other."""
    for j, whole in seen:
        columns = tiles.span(j)
        s_GXJ = q_GXD @ k_TGD[columns].permute(1, 2, 0).to(q_GXD.dtype)
        if not whole:
            hidden_IJ = ~tiles.ranges.sees(rows, columns)
            s_GXJ.view(s_GXJ.shape[0], -1, *hidden_IJ.shape).masked_fill_(hidden_IJ, -torch.inf)
        yield columns, s_GXJ


def _by_group(x_IHD: torch.Tensor, groups: int) -> torch.Tensor:
    """x_GXD: the query heads of a key head, one after the other."""
    return x_IHD.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _by_row(x_GXD: torch.Tensor, heads: int) -> torch.Tensor:
    """x_IHD, undoing `_by_group`."""
    return x_GXD.unflatten(1, (heads // x_GXD.shape[0], -1)).permute(2, 0, 1, 3).flatten(1, 2)
