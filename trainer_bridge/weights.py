"""A weight version in transit: a manifest and chunks, staged, checked, and only then a set of arrays.

Invariants:
- The manifest comes first and is checked against what the serving policy accepts before memory is taken, so a stage holds
  one policy's weights and no more.
- Chunks of a tensor come in order and without gaps; each tensor's digest is checked as its last byte arrives, and that every
  number is finite as its chunk does.
- `WeightStager.finish` gives every array of the manifest or raises; a stage that failed once stays failed.
- torch is never imported here: a tensor is recognised only where its owner has imported torch already.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import InvalidInput, TransportError
from .codec import DTYPES, MAX_NDIM, Buffer, Int, Row, read_record, refuse, write_record
from .messages import MAX_CHUNK, MAX_MANIFEST

WEIGHT_DTYPES = (*DTYPES, "bfloat16")
ANY_PARENT = -1
"""Parent of a version that may follow any smaller one."""
DIGEST = 32
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
"""A policy whose head is tied to its embedding has one tensor of these two, which a `state_dict()` names twice."""
_MANIFEST = 3
_HEADER = Row((Int(1), Int(ANY_PARENT)))


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a version: bfloat16 travels as the raw bits of uint16; `digest` is BLAKE2b-256 of the bytes."""

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
    """What a weight version consists of. `parent` is the version it follows, or ANY_PARENT."""

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
        """Names the content of the version, whatever it was pushed after."""
        return hashlib.blake2b(Manifest(self.version, ANY_PARENT, self.tensors).encode(), digest_size=DIGEST).digest()


def storage_dtype(dtype: str) -> np.dtype[Any]:
    """The NumPy dtype a tensor's bytes are kept in."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


def as_array(name: str, tensor: Any) -> tuple[str, np.ndarray]:
    """Dtype name and contiguous CPU array of a NumPy array or torch tensor (bfloat16 as uint16 bits).

    Raises InvalidInput for another type or a dtype that does not travel.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tensor, torch.Tensor):
        tensor = tensor.detach()
        if hasattr(tensor, "full_tensor"):
            tensor = tensor.full_tensor()
        tensor = tensor.cpu().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        array = tensor.view(torch.uint16).numpy() if dtype == "bfloat16" else _numpy(name, tensor, dtype)
    elif isinstance(tensor, np.ndarray | np.generic):
        array = np.asarray(tensor)
        dtype = array.dtype.name
        if dtype == "bfloat16":
            array = array.view(np.uint16)
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    else:
        raise InvalidInput(f"tensors[{name!r}]", f"a {type(tensor).__name__}", "give NumPy arrays or torch tensors")
    if dtype not in WEIGHT_DTYPES or array.ndim > MAX_NDIM:
        raise InvalidInput(f"tensors[{name!r}]", f"dtype {dtype} with {array.ndim} axes does not travel",
                           f"use one of {', '.join(WEIGHT_DTYPES)}")
    return dtype, array if array.flags.c_contiguous else np.ascontiguousarray(array)


def _numpy(name: str, tensor: Any, dtype: str) -> np.ndarray:
    if dtype not in WEIGHT_DTYPES:
        raise InvalidInput(f"tensors[{name!r}]", f"dtype {dtype} does not travel",
                           f"use one of {', '.join(WEIGHT_DTYPES)}")
    return tensor.numpy()


def make_manifest(version: int, parent: int, tensors: Mapping[str, Any]) -> Manifest:
    """The manifest of these tensors, in their order. Reads every byte once, for the digests."""
    if not tensors:
        raise InvalidInput("tensors", "empty", "push every tensor of the policy")
    specs = []
    for name, tensor in tensors.items():
        if not isinstance(name, str) or "\n" in name or not name:
            raise InvalidInput("tensors", f"name {name!r}", "use the policy's parameter names")
        dtype, array = as_array(name, tensor)
        specs.append(TensorSpec(name, dtype, array.shape, _hash(_bytes(array)).digest()))
    return Manifest(version, parent, tuple(specs))


def chunks(tensors: Mapping[str, Any], size: int = MAX_CHUNK) -> Iterator[tuple[int, int, memoryview]]:
    """(tensor index, byte offset, bytes) of every tensor in order, at most `size` bytes at a time."""
    for index, (name, tensor) in enumerate(tensors.items()):
        data = _bytes(as_array(name, tensor)[1])
        for offset in range(0, len(data), size):
            yield index, offset, data[offset:offset + size]


def without_tied_head(manifest: Manifest, expected: Mapping[str, Any]) -> tuple[Manifest, int]:
    """The manifest without the head of a policy that ties it to the embedding, and the head's index; -1 where nothing is tied.

    Raises TransportError for a head that is not the embedding.
    """
    places = {t.name: i for i, t in enumerate(manifest.tensors)}
    if HEAD in expected or EMBEDDING not in expected or HEAD not in places or EMBEDDING not in places:
        return manifest, -1
    index = places[HEAD]
    if replace(manifest.tensors[index], name=EMBEDDING) != manifest.tensors[places[EMBEDDING]]:
        raise TransportError(f"weight version {manifest.version}: {HEAD!r} differs from {EMBEDDING!r}, to which the head "
                             "of the serving policy is tied; push them equal, or leave the head out")
    return replace(manifest, tensors=(*manifest.tensors[:index], *manifest.tensors[index + 1:])), index


class WeightStager:
    """Collects one version and lets it out whole or not at all.

    Args:
        manifest: what will arrive, without a tied head (`without_tied_head`).
        expected: name -> (dtype, shape) the serving policy accepts. Raises TransportError where the manifest differs.
    """

    def __init__(self, manifest: Manifest, expected: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        found = {t.name: (t.dtype, t.shape) for t in manifest.tensors}
        if len(found) != len(manifest.tensors):
            raise refuse("manifest", "a tensor is named twice")
        for what, names in (("lacks", expected.keys() - found.keys()), ("has unknown", found.keys() - expected.keys())):
            if names:
                raise TransportError(f"weight version {manifest.version} {what} {len(names)} tensors, {min(names)!r} "
                                     "first; push exactly the serving policy's tensors")
        for name, (dtype, shape) in found.items():
            want = expected[name]
            if (dtype, shape) != (want[0], tuple(want[1])):
                raise TransportError(f"weight version {manifest.version}: {name!r} is {dtype}{list(shape)}, the "
                                     f"serving policy has {want[0]}{list(want[1])}; push the same dtypes and shapes")
        self.manifest, self.received = manifest, 0
        self._index = self._offset = 0
        self._failed = False
        self._arrays: list[np.ndarray] = []
        self._begin()

    def add(self, index: int, offset: int, data: Buffer) -> None:
        """The next chunk. Raises TransportError for a gap, a repeat, an overrun, a wrong digest or a number that is not
        finite: the stage is dead."""
        try:
            self._add(index, offset, data)
        except TransportError:
            self._failed = True
            self._arrays.clear()
            raise

    def _add(self, index: int, offset: int, data: Buffer) -> None:
        if self._failed:
            raise refuse("weights", "the stage failed before")
        if (index, offset) != (self._index, self._offset) or index >= len(self.manifest.tensors) or not len(data):
            raise refuse("weights", f"chunk at {index}:{offset} of {len(data)} bytes, "
                                    f"expected {self._index}:{self._offset}")
        spec = self.manifest.tensors[index]
        end = offset + len(data)
        if end > spec.size:
            raise refuse("weights", f"{spec.name!r} has {spec.size} bytes, a chunk reaches to {end}")
        _bytes(self._arrays[index])[offset:end] = data
        self._hash.update(data)
        self._check_finite(spec, offset, end)
        self._offset, self.received = end, self.received + 1
        if end == spec.size:
            self._end()
            self._index, self._offset = index + 1, 0
            self._begin()

    def finish(self) -> dict[str, np.ndarray]:
        """Every array of the manifest by name; the stage is spent. Raises TransportError when something is missing."""
        if self._failed or self._index < len(self.manifest.tensors):
            raise refuse("weights", f"{len(self.manifest.tensors) - self._index} tensors are missing or incomplete")
        self._failed = True
        arrays, self._arrays = self._arrays, []
        return {t.name: a for t, a in zip(self.manifest.tensors, arrays, strict=True)}

    def _begin(self) -> None:
        """Makes room for the next tensor; one without bytes is complete at once."""
        while self._index < len(self.manifest.tensors):
            spec = self.manifest.tensors[self._index]
            self._arrays.append(np.empty(spec.shape, storage_dtype(spec.dtype)))
            self._hash = _hash()
            if spec.size:
                return
            self._end()
            self._index += 1

    def _check_finite(self, spec: TensorSpec, start: int, end: int) -> None:
        """Looks at the numbers whose last byte is within start..end-1."""
        flat = self._arrays[self._index].reshape(-1)
        first = start // flat.itemsize
        finite = _finite(flat[first:end // flat.itemsize], spec.dtype)
        if not finite.all():
            place = tuple(int(i) for i in np.unravel_index(first + int(finite.argmin()), spec.shape))
            raise TransportError(f"weight version {self.manifest.version}: {spec.name!r} is not finite at {list(place)}; "
                                 "push numbers; the version before it serves on")

    def _end(self) -> None:
        spec = self.manifest.tensors[self._index]
        if self._hash.digest() != spec.digest:
            raise TransportError(f"weight version {self.manifest.version}: the bytes of {spec.name!r} do not have the "
                                 "digest of the manifest; push the version again")


def _finite(array: np.ndarray, dtype: str) -> np.ndarray:
    """Which numbers are neither NaN nor infinite, whatever the dtype; bfloat16 by its bits."""
    if dtype == "bfloat16":
        finite: np.ndarray = (array & 0x7F80) != 0x7F80
        return finite
    return np.isfinite(array)


def _hash(data: Buffer = b"") -> Any:
    return hashlib.blake2b(data, digest_size=DIGEST)


def _bytes(array: np.ndarray) -> memoryview:
    """The memory of a contiguous array as flat bytes."""
    return array.reshape(-1).view(np.uint8).data
