"""Counter-based random numbers: a draw is a function of (seed, position, purpose, token id) and of nothing else.

    bits = Philox4x32-10(key = (seed mod 2^32, seed div 2^32), counter = (position, purpose, block, 0))
    u    = (bits + 0.5) / 2^32                    strictly inside (0, 1)
    g    = -log(-log(u))                          Gumbel noise; token v reads lane v mod 4 of block v div 4

One round, with A = 0xD2511F53, B = 0xCD9E8D57 and 32-bit words:

    (c0, c1, c2, c3) <- (hi(B c2) ^ c1 ^ k0, lo(B c2), hi(A c0) ^ c3 ^ k1, lo(A c0))

then k0 += 0x9E3779B9, k1 += 0xBB67AE85. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from .reference import Purpose, gumbel, philox_4x32, uniform

__all__ = ["Purpose", "gumbel", "philox_4x32", "uniform"]
