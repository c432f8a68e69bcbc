"""Collects the tensors of a weight update that comes in chunks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .http_errors import HttpError


@dataclass(frozen=True)
class Tensor:
    """Bytes of a tensor from byte `offset` on, row-major and little-endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    data: bytes


class WeightChunks:
    """The tensors of one update.

    Args: expected: name -> (dtype, shape) of every tensor of the policy.
    """

    def __init__(self, expected: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        self._expected = expected
        self._tensors: dict[str, Any] = {}
        self._filled: dict[str, int] = {}

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Takes chunks, all or none; those of one tensor come in order. Raises HttpError for one that does not fit."""
        filled = dict(self._filled)
        for tensor in tensors:
            form = self._expected.get(tensor.name)
            if form is None:
                raise _bad(f"the policy has no tensor {tensor.name[:200]!r}; send the policy's own names")
            if form != (tensor.dtype, tensor.shape):
                raise _bad(f"{tensor.name!r} is {tensor.dtype[:20]}{list(tensor.shape)}, the policy has {form[0]}{list(form[1])}")
            there, size = filled.get(tensor.name, 0), _size(form)
            if tensor.offset != there or there + len(tensor.data) > size:
                raise _bad(f"{tensor.name!r} has {there} of {size} bytes; {len(tensor.data)} bytes at offset {tensor.offset} "
                           "do not follow them")
            filled[tensor.name] = there + len(tensor.data)
        for tensor in tensors:
            self._bytes(tensor.name)[tensor.offset : tensor.offset + len(tensor.data)] = tensor.data
        self._filled = filled

    def finish(self) -> dict[str, Any]:
        """Every tensor. Raises HttpError that names one that is missing or incomplete."""
        for name, form in self._expected.items():
            if self._filled.get(name, 0 if _size(form) else None) != _size(form):
                raise _bad(f"{name!r} has {self._filled.get(name, 0)} of {_size(form)} bytes; send every tensor of the policy. "
                           "The version before serves on")
        return self._tensors

    def _bytes(self, name: str) -> memoryview:
        import torch

        if name not in self._tensors:
            dtype, shape = self._expected[name]
            self._tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype))
        flat: memoryview = self._tensors[name].reshape(-1).view(torch.uint8).numpy().data
        return flat


def _size(form: tuple[str, tuple[int, ...]]) -> int:
    import torch

    return math.prod(form[1]) * int(getattr(torch, form[0]).itemsize)


def _bad(message: str) -> HttpError:
    return HttpError(400, f"update_info: {message}", "update_info", "invalid_weights")
