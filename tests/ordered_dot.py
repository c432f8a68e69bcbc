"""`tl.dot` of Triton's interpreter in one order of summation. The interpreter's own is NumPy's, that is OpenBLAS's: its order
depends on where a row stands in its tile, and on the processor."""

from __future__ import annotations

from typing import Any

import numpy as np

from blockroll.kernels.compiled import compiled


@compiled()
def add_product(a_MK, b_KN, sum_MN):
    """sum += a b, each element over k in order."""
    for m in range(a_MK.shape[0]):
        for k in range(a_MK.shape[1]):
            x = a_MK[m, k]
            for n in range(b_KN.shape[1]):
                sum_MN[m, n] += x * b_KN[k, n]


def install() -> None:
    """For all kernels that this process interprets, with sums in float32 and float64."""
    from triton.runtime import interpreter

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        kind = d.data.dtype
        assert a.data.ndim == 2 and kind in (np.float32, np.float64), (a.data.shape, kind)
        sum_MN = np.array(d.data, order="C")
        add_product(np.ascontiguousarray(a.data, kind), np.ascontiguousarray(b.data, kind), sum_MN)
        return interpreter.TensorHandle(sum_MN, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot
