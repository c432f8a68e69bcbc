"""The manifest of a weight version: the name, dtype, shape and digest of each tensor. It travels before the tensors'
bytes."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ...errors import InvalidInput
from .codec import DTYPES, Buffer, Int, Row, read_record, refuse, write_record
from .limits import MAX_MANIFEST, MAX_NDIM

WEIGHT_DTYPES = (*DTYPES, "bfloat16")
ANY_PARENT = -1
"""Parent of a version that may follow any smaller one."""
DIGEST = 32
_MANIFEST = 3
_HEADER = Row((Int(1), Int(ANY_PARENT)))


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a version. bfloat16 travels as the raw bits of uint16. `digest` is the BLAKE2b-256 of the bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * storage_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Manifest:
    """The tensors of a weight version, in their order. `parent` is the version it follows, or ANY_PARENT."""

    version: int
    parent: int
    tensors: tuple[TensorSpec, ...]

    def encode(self) -> bytes:
        """The manifest as a record; raises InvalidInput when it is too long to travel."""
        names = "\n".join(t.name for t in self.tensors).encode()
        record = write_record(_MANIFEST, _HEADER.pack((self.version, self.parent), "manifest"), [
            np.frombuffer(names, np.uint8),
            np.array([WEIGHT_DTYPES.index(t.dtype) for t in self.tensors], np.uint8),
            np.array([len(t.shape) for t in self.tensors], np.uint8),
            np.array([d for t in self.tensors for d in t.shape], np.int64),
            np.frombuffer(b"".join(t.digest for t in self.tensors), np.uint8).reshape(-1, DIGEST)])
        if len(record) > MAX_MANIFEST:
            raise InvalidInput("tensors", f"a manifest of {len(record)} bytes", f"at most {MAX_MANIFEST} travel")
        return record

    @classmethod
    def decode(cls, data: Buffer) -> Manifest:
        """The manifest of a record; raises TransportError for anything else."""
        header, arrays = read_record(data, _MANIFEST, 5, MAX_MANIFEST)
        version, parent = _HEADER.unpack(header, "manifest")
        wanted = (("uint8", 1), ("uint8", 1), ("uint8", 1), ("int64", 1), ("uint8", 2))
        for array, (dtype, axes) in zip(arrays, wanted, strict=True):
            if array is None or array.dtype.name != dtype or array.ndim != axes:
                raise refuse("manifest", "columns of the wrong type")
        text, dtypes, ndims, dims, digests = (a for a in arrays if a is not None)
        count = len(dtypes)
        raw = text.tobytes()
        ok = (count > 0 and raw.count(b"\n") == count - 1 and len(ndims) == count and digests.shape == (count, DIGEST)
              and dtypes.max() < len(WEIGHT_DTYPES) and ndims.max() <= MAX_NDIM and len(dims) == int(ndims.sum())
              and (len(dims) == 0 or (dims.min() >= 0 and dims.max() < 2**40)))
        if not ok:
            raise refuse("manifest", "columns that do not fit together")
        try:
            names = raw.decode().split("\n")
        except UnicodeDecodeError:
            raise refuse("manifest", "names that are not UTF-8") from None
        ends = np.cumsum(ndims.astype(np.int64))
        shapes = (tuple(dims[end - ndim:end].tolist()) for end, ndim in zip(ends, ndims))
        return cls(version, parent, tuple(
            TensorSpec(name, WEIGHT_DTYPES[dtype], shape, digest.tobytes())
            for name, dtype, shape, digest in zip(names, dtypes, shapes, digests)))

    @cached_property
    def digest(self) -> bytes:
        """Digest that identifies the version's number and content, whatever its parent."""
        return hashlib.blake2b(Manifest(self.version, ANY_PARENT, self.tensors).encode(), digest_size=DIGEST).digest()


def finite_mask(array: np.ndarray, dtype: str) -> np.ndarray:
    """Which numbers are neither NaN nor infinite. bfloat16 numbers are checked by their bits."""
    if dtype == "bfloat16":
        finite: np.ndarray = (array & 0x7F80) != 0x7F80
        return finite
    return np.isfinite(array)


def storage_dtype(dtype: str) -> np.dtype[Any]:
    """The NumPy dtype a tensor's bytes are kept in."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


def new_digest(data: Buffer = b"") -> Any:
    """The hash of a tensor's bytes, to be updated with more of them."""
    return hashlib.blake2b(data, digest_size=DIGEST)


def flat_bytes(array: np.ndarray) -> memoryview:
    """The memory of a contiguous array as flat bytes."""
    return array.reshape(-1).view(np.uint8).data
