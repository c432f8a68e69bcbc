"""Counter-based random numbers: a draw is a function of (seed, position, purpose, token id) and of nothing else.

    bits = Philox4x32-10(key = (seed mod 2^32, seed div 2^32), counter = (position, purpose, block, 0))
    u    = (bits + 0.5) / 2^32                    strictly inside (0, 1)
    g    = -log(-log(u))                          Gumbel noise; token v reads lane v mod 4 of block v div 4

One round, with A = 0xD2511F53, B = 0xCD9E8D57 and 32-bit words:

    (c0, c1, c2, c3) <- (hi(B c2) ^ c1 ^ k0, lo(B c2), hi(A c0) ^ c3 ^ k1, lo(A c0))

then k0 += 0x9E3779B9, k1 += 0xBB67AE85. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import torch

from ..dispatch import takes_triton
from . import reference
from .reference import Purpose

__all__ = ["Purpose", "gumbel", "uniform"]


def uniform(seed_R: torch.Tensor, position_R: torch.Tensor, purpose: int | torch.Tensor) -> torch.Tensor:
    """One float64 per row in (0, 1), a multiple of 2^-33; see `reference.uniform`."""
    if takes_triton(seed_R):
        from . import triton as fast

        return fast.uniform(seed_R, position_R, purpose)
    return reference.uniform(seed_R, position_R, purpose)


def gumbel(
    seed_R: torch.Tensor, position_R: torch.Tensor, vocab_size: int, purpose: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Gumbel noise g_RV for every token of the vocabulary; see `reference.gumbel`."""
    if takes_triton(seed_R):
        from . import triton as fast

        return fast.gumbel(seed_R, position_R, vocab_size, purpose, dtype)
    return reference.gumbel(seed_R, position_R, vocab_size, purpose, dtype)
