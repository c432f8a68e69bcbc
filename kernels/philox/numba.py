"""Philox4x32-10 one number at a time, for functions that numba compiles. The bits are those of `reference`."""

from __future__ import annotations

import numpy as np

from ..compiled import compiled

_U = np.uint64
_A, _B, _STEP_LO, _STEP_HI, _LOW = _U(0xD2511F53), _U(0xCD9E8D57), _U(0x9E3779B9), _U(0xBB67AE85), _U(0xFFFFFFFF)


@compiled()
def words(seed, position, purpose, block):
    """The four output words, uint64 below 2^32, of key `seed` and counter (position, purpose, block, 0)."""
    k0, k1 = _U(seed) & _LOW, _U(seed) >> _U(32)
    c0, c1, c2, c3 = _U(position), _U(purpose), _U(block), _U(0)
    for _ in range(10):
        a, b = c0 * _A, c2 * _B
        c0, c2 = (b >> _U(32)) ^ c1 ^ k0, (a >> _U(32)) ^ c3 ^ k1
        c1, c3 = b & _LOW, a & _LOW
        k0, k1 = (k0 + _STEP_LO) & _LOW, (k1 + _STEP_HI) & _LOW
    return c0, c1, c2, c3


@compiled()
def uniform(seed, position, purpose):
    """One number in (0, 1)."""
    return (np.float64(words(seed, position, purpose, 0)[0]) + 0.5) * 2.0**-32


@compiled()
def fill_words(seed, position, purpose, words_W4):
    """The words of blocks 0, 1, ... into uint32[W, 4]: token v reads entry v of it, flat."""
    for block in range(words_W4.shape[0]):
        w0, w1, w2, w3 = words(seed, position, purpose, block)
        words_W4[block, 0], words_W4[block, 1] = np.uint32(w0), np.uint32(w1)
        words_W4[block, 2], words_W4[block, 3] = np.uint32(w2), np.uint32(w3)
