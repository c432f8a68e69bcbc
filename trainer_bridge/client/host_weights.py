"""The tensors of a weight push in host memory, from which the manifest and the chunks are made.

Invariants:
- Each tensor is copied from its device once per push, however often the push is begun again. A contiguous tensor that
  is in host memory already is not copied.
- torch is never imported here. A tensor is recognised where its owner has imported torch already.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import InvalidInput
from ..wire.codec import Buffer
from ..wire.limits import MAX_CHUNK, MAX_NDIM
from ..wire.manifest import WEIGHT_DTYPES, Manifest, TensorSpec, finite_mask, flat_bytes, new_digest

_LOOK = 1 << 18
"""Numbers checked at a time: what is made of them fits into a processor's cache."""
_HASHERS = min(4, os.cpu_count() or 1)
"""Threads that make digests. One makes about 1 GB/s."""


@dataclass(frozen=True)
class HostWeights:
    """(name, dtype name, contiguous array) of every tensor, in order; bfloat16 as the uint16 array of its bits."""

    tensors: tuple[tuple[str, str, np.ndarray], ...]

    @classmethod
    def copy_of(cls, tensors: Mapping[str, Any]) -> HostWeights:
        """Takes NumPy arrays or torch tensors. Raises InvalidInput for a name, a type or a dtype that does not
        travel."""
        if not tensors:
            raise InvalidInput("tensors", "empty", "push every tensor of the policy")
        found = []
        for name, tensor in tensors.items():
            if not isinstance(name, str) or "\n" in name or not name:
                raise InvalidInput("tensors", f"name {name!r}", "use the policy's parameter names")
            found.append((name, *host_array(name, tensor)))
        return cls(tuple(found))

    def check_finite(self) -> None:
        """Raises InvalidInput for a number that is NaN or infinite."""
        for name, dtype, array in self.tensors:
            if "float" in dtype:
                _check_finite(name, dtype, array)

    def manifest(self, version: int, parent: int) -> Manifest:
        """The manifest of these tensors, in their order. Memory that is there under two names, a tied head's, is read once."""
        places = [array.__array_interface__["data"][0] for _, _, array in self.tensors]
        parts = {(place, array.nbytes): array for place, (_, _, array) in zip(places, self.tensors, strict=True)}
        with ThreadPoolExecutor(_HASHERS, "blockroll-digest") as hashers:
            found = dict(zip(parts, hashers.map(lambda part: new_digest(flat_bytes(part)).digest(), parts.values()), strict=True))
        return Manifest(version, parent, tuple(TensorSpec(name, dtype, array.shape, found[place, array.nbytes])
                                               for place, (name, dtype, array) in zip(places, self.tensors, strict=True)))

    def chunks(self, size: int = MAX_CHUNK, needed: Buffer | None = None) -> Iterator[tuple[int, int, memoryview]]:
        """(tensor index, byte offset, bytes) of every tensor in order, at most `size` bytes at a time.

        Args: needed: a byte per tensor, 0 for one that is left out; None leaves out none.
        """
        for index, (_, _, array) in enumerate(self.tensors):
            if needed is not None and not needed[index]:
                continue
            data = flat_bytes(array)
            for offset in range(0, len(data), size):
                yield index, offset, data[offset:offset + size]


def host_array(name: str, tensor: Any) -> tuple[str, np.ndarray]:
    """Dtype name and contiguous array in host memory of a NumPy array or torch tensor (bfloat16 as uint16 bits).

    Raises InvalidInput for another type or a dtype that does not travel.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tensor, torch.Tensor):
        tensor = tensor.detach()
        if hasattr(tensor, "full_tensor"):
            tensor = tensor.full_tensor()
        dtype = str(tensor.dtype).removeprefix("torch.")
        _check(name, dtype, tensor.ndim)
        tensor = tensor.cpu().contiguous()
        array = tensor.view(torch.uint16).numpy() if dtype == "bfloat16" else tensor.numpy()
    elif isinstance(tensor, np.ndarray | np.generic):
        array = np.asarray(tensor)
        dtype = array.dtype.name
        _check(name, dtype, array.ndim)
        if dtype == "bfloat16":
            array = array.view(np.uint16)
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    else:
        raise InvalidInput(f"tensors[{name!r}]", f"a {type(tensor).__name__}", "give NumPy arrays or torch tensors")
    return dtype, array if array.flags.c_contiguous else np.ascontiguousarray(array)


def _check_finite(name: str, dtype: str, array: np.ndarray) -> None:
    """Looks at _LOOK numbers at a time, which bounds the memory it takes."""
    flat = array.reshape(-1)
    for start in range(0, len(flat), _LOOK):
        finite = finite_mask(flat[start:start + _LOOK], dtype)
        if not finite.all():
            place = [int(i) for i in np.unravel_index(start + int(finite.argmin()), array.shape)]
            raise InvalidInput(f"tensors[{name!r}]", f"not finite at {place}", "push finite numbers; nothing was sent")


def _check(name: str, dtype: str, axes: int) -> None:
    if dtype not in WEIGHT_DTYPES or axes > MAX_NDIM:
        raise InvalidInput(f"tensors[{name!r}]", f"dtype {dtype} with {axes} axes does not travel",
                           f"use one of {', '.join(WEIGHT_DTYPES)}")
