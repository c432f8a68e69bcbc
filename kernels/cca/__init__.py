"""Compressed convolutional attention (CCA): the convolutions of ZAYA's query/key path, along parents.

With x the concatenated q and k projections, x(t, h) the projection h parents above row t (zero before the document):

    y(t, h)  = b_dw + sum_j w_dw[j] * x(t, h + j)           depthwise, j = 0 .. time0 - 1
    out(t)   = b_g  + sum_h W_g[h] y(t, h)                  grouped by head, h = 0 .. time1 - 1

The depthwise output before the document is b_dw, not zero. Source: arXiv 2510.04476.
"""

from .reference import convolve, normalise

__all__ = ["convolve", "normalise"]
