"""Compressed convolutional attention (CCA): from ZAYA's projections to queries, keys and values, along parents.

With x the concatenated q and k projections, x(t, h) the projection h parents above row t (zero before the document):

    y(t, h)  = b_dw + sum_j w_dw[j] * x(t, h + j)           depthwise, j = 0 .. time0 - 1
    c(t)     = b_g  + sum_h W_g[h] y(t, h)                  grouped by head, h = 0 .. time1 - 1
    q_u      = c_u + (x_u + x_g) / 2                        query head u of key head g
    k_g      = c_g + (x_g + mean_u x_u) / 2
    q, k     = RoPE(sqrt(D) q / |q|), RoPE(temp_g sqrt(D) k / |k|)          on the first features of a head
    v(t)     = [current value of t, delayed value of t's parent]

The depthwise output before the document is b_dw, not zero. Sources: arXiv 2510.04476; RoPE arXiv 2104.09864, half-split.
"""

from __future__ import annotations

from ..dispatch import dispatched
from . import reference
from .places import NOTHING, Places, Pools
from .reference import CCAInputs, CCAWeights, queries_keys_values, taps_apart

__all__ = ["NOTHING", "CCAInputs", "CCAWeights", "Places", "Pools", "cca", "queries_keys_values", "taps_apart"]

cca = dispatched(reference.cca, wide=False)
