"""The support that cut-offs leave, without a sort of the vocabulary: the value at its edge is found by bisection.

    key(x)     integers in the order of the numbers
    edge_k     the smallest t with  |{x > t}| < top_k
    edge_p     the smallest t with  sum of exp(x - max) over {x > t}  <  top_p * (that sum over the top_k)
    support    {x > t} and the first few of {x = t}, with t the largest of edge_k, edge_p and the bound of min-p

The support is that of a sort over the same masses, ties included. `processing.kept` on a CPU sums float32 probabilities, so a
few tokens at the edge of a flat distribution may differ there.

Invariants:
- Nothing waits for the device, and a row's support depends on that row alone.
- Rows are taken a few at a time: memory beside the result is bounded, whatever the number of rows.

Legend: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_NUMBERS_AT_ONCE = 1 << 24
"""Numbers of the rows that are taken at once: they fit into the last cache of an MI300X with what is made of them."""


def support(
    scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor, any_top_k: bool = True
) -> torch.Tensor:
    """As `processing.kept`, with the parameters in the shape of the rows. `any_top_k`: whether some row has a top-k."""
    flat_NV = scaled.reshape(-1, scaled.shape[-1])
    parameters = [each.expand(scaled.shape[:-1]).reshape(-1) for each in (top_k, top_p, min_p)]
    at_once = max(_NUMBERS_AT_ONCE // flat_NV.shape[1], 1)
    keep_NV = torch.empty_like(flat_NV, dtype=torch.bool)
    for start in range(0, len(flat_NV), at_once):
        rows = slice(start, start + at_once)
        k_N1, p_N1, m_N1 = (each[rows, None] for each in parameters)
        _support(flat_NV[rows], k_N1, p_N1, m_N1, any_top_k, keep_NV[rows])
    return keep_NV.view(scaled.shape)


def _support(
    x_NV: torch.Tensor, top_k_N1: torch.Tensor, top_p_N1: torch.Tensor, min_p_N1: torch.Tensor, any_top_k: bool,
    keep_NV: torch.Tensor,
) -> None:  # fmt: skip
    """Write the support into `keep_NV`."""
    key_NV, vocab_size = _key(x_NV), x_NV.shape[1]
    largest_N1 = x_NV.amax(-1, keepdim=True)
    highest_N1 = _key(largest_N1).long()
    lowest_N1 = torch.full_like(highest_N1, torch.iinfo(key_NV.dtype).min)
    weight_NV = (x_NV - largest_N1).exp_()

    def mass(above_NV: torch.Tensor) -> torch.Tensor:
        return torch.where(above_NV, weight_NV, 0.0).sum(-1, keepdim=True, dtype=torch.float64)

    def smallest(reached: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The smallest t for which it holds; it holds for the largest number of the row."""
        low, high = lowest_N1, highest_N1
        for _ in range(8 * x_NV.itemsize):
            middle = (low >> 1) + (high >> 1) + (low & high & 1)
            holds = reached(middle)
            low, high = torch.where(holds, low, middle + 1), torch.where(holds, middle, high)
        return high

    edge_k_N1, total_N1 = lowest_N1, weight_NV.sum(-1, keepdim=True, dtype=torch.float64)
    room_k_N1 = torch.full_like(highest_N1, vocab_size)
    if any_top_k:
        cuts_N1 = top_k_N1 > 0
        edge_N1 = smallest(lambda t: (key_NV > t).sum(-1, keepdim=True) < top_k_N1)
        above_NV = key_NV > edge_N1
        room_N1 = torch.minimum(top_k_N1 - above_NV.sum(-1, keepdim=True), (key_NV == edge_N1).sum(-1, keepdim=True))
        kept_N1 = mass(above_NV) + room_N1 * _weight_at(key_NV, edge_N1, weight_NV)
        edge_k_N1, room_k_N1 = torch.where(cuts_N1, edge_N1, edge_k_N1), torch.where(cuts_N1, room_N1, room_k_N1)
        total_N1 = torch.where(cuts_N1, kept_N1, total_N1)

    bound_N1 = top_p_N1 * total_N1
    edge_p_N1 = smallest(lambda t: mass(key_NV > t) < bound_N1)
    tied_N1 = _weight_at(key_NV, edge_p_N1, weight_NV)
    # The j-th of equal numbers is kept while `before + j * weight` is below the bound.
    room_p_N1 = ((bound_N1 - mass(key_NV > edge_p_N1)) / tied_N1.clamp_min(1e-300)).ceil().clamp(1, vocab_size).long()
    cuts_N1 = top_p_N1 < 1
    edge_p_N1, room_p_N1 = torch.where(cuts_N1, edge_p_N1, lowest_N1), torch.where(cuts_N1, room_p_N1, vocab_size)

    edge_m_N1 = _key(largest_N1 + min_p_N1.log().to(x_NV.dtype)).long()
    edge_N1 = torch.maximum(torch.maximum(edge_k_N1, edge_p_N1), edge_m_N1)
    room_N1 = torch.minimum(torch.where(edge_k_N1 == edge_N1, room_k_N1, vocab_size),
                            torch.where(edge_p_N1 == edge_N1, room_p_N1, vocab_size))  # fmt: skip
    tied_NV = key_NV == edge_N1
    torch.logical_or(key_NV > edge_N1, tied_NV & (tied_NV.cumsum(-1, dtype=torch.int32) <= room_N1), out=keep_NV)


def _key(x: torch.Tensor) -> torch.Tensor:
    """Integers of the numbers' width in their order; both zeros are one number."""
    whole = torch.int32 if x.itemsize == 4 else torch.int64
    bits = (x + 0.0).view(whole)
    return bits ^ ((bits >> (8 * x.itemsize - 1)) & torch.iinfo(whole).max)


def _weight_at(key_NV: torch.Tensor, key_N1: torch.Tensor, weight_NV: torch.Tensor) -> torch.Tensor:
    """The weight of numbers with this key; 0 where there is none."""
    return torch.where(key_NV == key_N1, weight_NV, 0.0).amax(-1, keepdim=True).double()
