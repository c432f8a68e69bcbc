"""Addresses of tensors, for functions that numba compiles: a numpy array of a tensor takes four times as long to make, and as
long as a small function runs.

Invariant: who takes an address holds the tensor until the call has ended.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from .compiled import compiled


def flat(dtype: torch.dtype, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Contiguous tensors of this dtype with the same numbers: the tensors themselves, where they are that."""
    return [x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous() for x in tensors]


def addresses(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Where the numbers of each begin."""
    return [x.data_ptr() for x in tensors]


@intrinsic
def _pointer(typing_context, address):
    """A pointer to an address."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@compiled(inlined=True)
def floats(address, shape):
    """The float32 array of this shape at an address."""
    return carray(_pointer(address), shape, np.float32)


@compiled(inlined=True)
def doubles(address, shape):
    """The float64 array of this shape at an address."""
    return carray(_pointer(address), shape, np.float64)


@compiled(inlined=True)
def integers(address, shape):
    """The int64 array of this shape at an address."""
    return carray(_pointer(address), shape, np.int64)
