"""Tile sizes of the expert and router kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ..dispatch import batch_invariant
from ..launch import architecture, pipeline


class Tile(NamedTuple):
    """Rows m, output features n and summed features k of one step of a product; warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


_AMD = {"gfx942": {"matrix_instr_nonkdim": 16, "kpack": 2}, "gfx950": {"matrix_instr_nonkdim": 16}}


def options() -> Mapping[str, int]:
    """Of the compiler. On AMD, products of 16 x 16: those of 32 x 32, which the compiler chooses, take twice the registers.
    kpack 2 reads two products' operands from LDS at once. Triton ignores it on gfx950, whose instructions take as many."""
    return _AMD.get(architecture(), {})


def expert_tiles(rows: int, experts: int, dtype: torch.dtype) -> tuple[Tile, Tile]:
    """Tiles of the gate-and-up product, whose n counts twice, and of the down product.

    Few rows mostly read weights, so the tiles are small enough that many programs read at once. Many rows are bound by
    arithmetic. Half a tile per expert is padding: 64 rows per tile pad 1,568 rows of 16 experts by a third, 128 by two thirds;
    and an expert's tiles share its weights in a cache, so that 128 pay late. Under `batch_invariant` there is one choice for
    every number of rows: with 64, padding is still cheaper than reading the weights.
    """
    wide, amd = dtype.itemsize > 2, architecture().startswith("gfx")
    if batch_invariant():
        tiles = Tile(64, 32, 64, 4, 3), Tile(64, 64, 64, 4, 3)
    elif rows <= 16:
        tiles = Tile(16, 16, 256, 4, 3), Tile(16, 16, 256, 4, 3)
    elif rows <= 16 * experts:
        tiles = Tile(16, 32, 128, 4, 4), Tile(16, 64, 128, 4, 4)
    elif rows <= 32 * experts:
        # 64 KiB of LDS hold five programs of 64 features, two of 128.
        k = 64 if architecture() == "gfx942" else 128
        tiles = Tile(32, 32, k, 4, 3), Tile(32, 64, k, 4, 3)
    elif rows <= 96 * experts:
        tiles = (Tile(64, 32, 64, 4, 3), Tile(64, 64, 64, 4, 3)) if amd else (Tile(64, 64, 64, 4, 3), Tile(64, 128, 64, 4, 3))
    elif rows <= 256 * experts:
        warps = 8 if amd else 4
        tiles = Tile(64, 64, 64, warps, 3), Tile(64, 128, 64, warps, 3)
    else:
        tiles = Tile(128, 64, 64, 8, 3), Tile(128, 128, 64, 8, 3)
    gate_up, down = (
        tile._replace(k=tile.k // 2 if wide else tile.k, stages=pipeline(tile.stages)) for tile in tiles
    )
    return gate_up, down
