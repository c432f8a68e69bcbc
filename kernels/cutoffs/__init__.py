"""Cut-offs of a distribution over the vocabulary: top-k, top-p and min-p, without a copy of the logits.

    x       logits over the temperature, in order: x_0 >= x_1 >= ...
    w_i     trunc(s exp(x_i - x_0)), a whole number;  s = 2^44 for less than 2^19 tokens, 2^(63 - bits of their number) for more
    top-k   keeps i < k
    top-p   keeps i with  w_0 + ... + w_(i-1)  <  max(ceil(top_p * W), 1),  W the sum of w over what top-k keeps
    min-p   keeps i with  x_i >= x_0 + log(min_p)

What all three keep is a prefix of the order, so its edge describes it: the tokens above `Edges.value`, and of those that equal it
the ones up to id `Edges.last`. Of equal numbers those with the lower ids come first. Source: nucleus sampling, arXiv 1904.09751;
min-p, arXiv 2407.01082.

Weights are whole numbers, so their sums have one value in every order of summation: the kept set does not depend on how a row is
cut into parts, nor on the rows beside it. A weight below 1/s of the largest counts as 0.

`lossless` accepts drafts by p and q over these sets, `coupled` and `ar` compare noisy logits within them. So verification, drafts
and `ar` must find the same set for the same logits: there is this op and no other.
"""

from __future__ import annotations

from ..dispatch import dispatched
from . import reference
from .reference import Edges, inside

__all__ = ["Edges", "cut_", "edges", "inside"]

edges = dispatched(reference.edges, wide=False)
cut_ = dispatched(reference.cut_, wide=False)
