"""Philox4x32-10 over whole tensors, with plain 64-bit integers.

Invariants:
- Bit for bit the generator of Random123 and of Triton's `tl.philox`; integer arithmetic only, so equal on every device.
- A draw depends on its own key and counter, never on its place in a batch.
- CPU tensors are computed through NumPy (a third of torch's cost per small call) by the same function.

Legend: R = rows, V = vocabulary, W = ceil(V / 4).
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
import torch

_A, _B = 0xD2511F53, 0xCD9E8D57
_STEP_LO, _STEP_HI = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
_BLOCK_COUNTERS = 1 << 16  # counters computed at once on a CPU: the working arrays stay inside the second-level cache


class Purpose(IntEnum):
    """The purpose of a draw: two draws of one position never share a counter. The values are part of the format: changing one
    changes every trajectory."""

    NOISE = 0
    DRAFT = 1
    ACCEPT = 2
    RESAMPLE = 3


def _rounds(k0: Any, k1: Any, c0: Any, c1: Any, c2: Any, c3: Any) -> tuple[Any, Any, Any, Any]:
    """Ten rounds on int64 arrays or tensors. A product wraps at 64 bits, which keeps both of its 32-bit halves right.
    c1 and c3 keep their upper half until the next round's mask, which also clears the sign bits the shift drags in."""
    for _ in range(10):
        product_0, product_2 = c0 * _A, c2 * _B
        c0 = ((product_2 >> 32) ^ c1 ^ k0) & _LOW
        c2 = ((product_0 >> 32) ^ c3 ^ k1) & _LOW
        c1, c3 = product_2, product_0
        k0, k1 = (k0 + _STEP_LO) & _LOW, (k1 + _STEP_HI) & _LOW
    return c0, c1 & _LOW, c2, c3 & _LOW


def philox_4x32(
    key_lo: torch.Tensor,
    key_hi: torch.Tensor,
    c0: torch.Tensor,
    c1: torch.Tensor,
    c2: torch.Tensor,
    c3: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The four output words of each (key, counter).

    Args: int64 tensors with values in [0, 2^32), broadcast against each other; at least one dimension each.
    Returns: four int64 tensors of the broadcast shape, values in [0, 2^32).
    """
    words = (key_lo, key_hi, c0, c1, c2, c3)
    if key_lo.device.type != "cpu":
        return _rounds(*words)
    out = _rounds(*(word.numpy() for word in words))
    return torch.from_numpy(out[0]), torch.from_numpy(out[1]), torch.from_numpy(out[2]), torch.from_numpy(out[3])


def uniform(seed_R: torch.Tensor, position_R: torch.Tensor, purpose: int | torch.Tensor) -> torch.Tensor:
    """One number per row, strictly inside (0, 1), a multiple of 2^-33.

    Args:
        seed_R: int64, non-negative. position_R: int64 in [0, 2^32). purpose: a `Purpose`, or an int64 tensor of them.
            All broadcast against each other.
    Returns: float64 of the broadcast shape. Casting it to float32 can round it to 1.
    """
    zero = torch.zeros(1, dtype=torch.int64, device=seed_R.device)
    purpose_R = purpose if isinstance(purpose, torch.Tensor) else zero + int(purpose)
    bits = philox_4x32(seed_R & _LOW, (seed_R >> 32) & _LOW, position_R, purpose_R, zero, zero)[0]
    return (bits.to(torch.float64) + 0.5) * 2.0**-32


def gumbel(
    seed_R: torch.Tensor, position_R: torch.Tensor, vocab_size: int, purpose: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Gumbel noise for every token of the vocabulary.

    Args:
        seed_R: int64, non-negative. position_R: int64 in [0, 2^32). Of one shape, or broadcast against each other.
    Returns: g_RV, computed in float64 and then cast to `dtype`; values lie in (-3.2, 22.9).
    """
    seed_R, position_R = torch.broadcast_tensors(seed_R, position_R)
    shape = seed_R.shape
    seed_N1, position_N1 = seed_R.reshape(-1, 1), position_R.reshape(-1, 1)
    block_W = torch.arange((vocab_size + 3) // 4, dtype=torch.int64, device=seed_R.device)
    if seed_R.device.type != "cpu":
        g_NV = _gumbel_torch(seed_N1, position_N1, block_W, purpose)[:, :vocab_size]
        return g_NV.to(dtype).reshape(*shape, vocab_size)
    g_NV = torch.empty(len(seed_N1), vocab_size, dtype=dtype)
    step = max(1, _BLOCK_COUNTERS // len(block_W))
    for i in range(0, len(seed_N1), step):
        rows = slice(i, i + step)
        g_NV[rows] = torch.from_numpy(_gumbel_numpy(seed_N1[rows], position_N1[rows], block_W, purpose))[:, :vocab_size]
    return g_NV.reshape(*shape, vocab_size)


def _gumbel_torch(
    seed_N1: torch.Tensor, position_N1: torch.Tensor, block_W: torch.Tensor, purpose: int
) -> torch.Tensor:
    """float64[N, 4W] on any device."""
    zero = torch.zeros(1, dtype=torch.int64, device=seed_N1.device)
    words = _rounds(seed_N1 & _LOW, (seed_N1 >> 32) & _LOW, position_N1, zero + int(purpose), block_W, zero)
    u_NV = (torch.stack(words, -1).flatten(-2).to(torch.float64) + 0.5) * 2.0**-32
    return -torch.log(-torch.log(u_NV))


def _gumbel_numpy(seed_N1: torch.Tensor, position_N1: torch.Tensor, block_W: torch.Tensor, purpose: int) -> np.ndarray:
    """float64[N, 4W] on a CPU, in place where it can be."""
    seed, zero = seed_N1.numpy(), np.zeros(1, dtype=np.int64)
    words = _rounds(seed & _LOW, (seed >> 32) & _LOW, position_N1.numpy(), zero + int(purpose), block_W.numpy(), zero)
    out = np.empty((len(seed), len(block_W), 4))
    for lane, word in enumerate(words):
        out[..., lane] = word
    out += 0.5
    out *= 2.0**-32
    for _ in range(2):
        np.log(out, out=out)
        np.negative(out, out=out)
    return out.reshape(len(seed), -1)
