"""Tile sizes of the expert and router kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..dispatch import batch_invariant
from ..launch import pipeline


class Tile(NamedTuple):
    """Rows m, output features n and summed features k of one step of a product; warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def expert_tiles(rows: int, experts: int, dtype: torch.dtype) -> tuple[Tile, Tile]:
    """Tiles of the gate-and-up product, whose n counts twice, and of the down product.

    Few rows mostly read weights, so the tiles are small enough that many programs read at once. Many rows are bound by
    arithmetic. Under `batch_invariant` there is one choice for every number of rows: with 64, padding is still cheaper than
    reading the weights.
    """
    wide = dtype.itemsize > 2
    if batch_invariant():
        tiles = Tile(64, 32, 64, 4, 3), Tile(64, 64, 64, 4, 3)
    elif rows <= 16:
        tiles = Tile(16, 16, 256, 4, 3), Tile(16, 16, 256, 4, 3)
    elif rows <= 16 * experts:
        tiles = Tile(16, 32, 128, 4, 4), Tile(16, 64, 128, 4, 4)
    elif rows <= 32 * experts:
        tiles = Tile(32, 32, 128, 4, 3), Tile(32, 64, 128, 4, 3)
    elif rows <= 96 * experts:
        tiles = Tile(64, 64, 64, 4, 3), Tile(64, 128, 64, 4, 3)
    else:
        tiles = Tile(128, 64, 64, 8, 3), Tile(128, 128, 64, 8, 3)
    gate_up, down = (
        tile._replace(k=tile.k // 2 if wide else tile.k, stages=pipeline(tile.stages)) for tile in tiles
    )
    return gate_up, down
