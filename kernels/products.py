"""The product of two tiles in Triton, for kernels that multiply rows with a weight."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_product(
    x_at, w_at, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """float32[M, N]: x w, summed over D features, K at a time and in order.

    Args:
        x_at: pointers [M, 1] to the first feature of each row. w_at: pointers [1, N] to the first feature of each output.
    """
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, D, K):
        k = start + tl.arange(0, K)
        if D % K:
            x = tl.load(x_at + k[None, :], mask=(k < D)[None, :], other=0.0)
            w = tl.load(w_at + k[:, None], mask=(k < D)[:, None], other=0.0)
        else:
            x, w = tl.load(x_at + k[None, :]), tl.load(w_at + k[:, None])
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return acc
