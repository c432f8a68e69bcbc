"""Collects the chunks of one weight version and checks them; gives out every array that had to come, or none.

Invariants:
- The manifest is checked against the serving policy before memory is taken, so a stage holds at most one policy's
  weights.
- Chunks of a tensor come in order and without gaps. Every number of a chunk is checked to be finite when the chunk
  arrives, and a tensor's digest is checked when its last byte arrives.
- `WeightStager.finish` returns every array that was needed or raises. A stage that failed once stays failed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ...errors import TransportError
from ..wire.codec import Buffer, refuse
from ..wire.manifest import Manifest, TensorSpec, finite_mask, flat_bytes, new_digest, storage_dtype

Form = tuple[str, tuple[int, ...]]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
"""A policy that ties its head to its embedding has one tensor under these two names; a `state_dict()` lists both."""


def without_tied_head(manifest: Manifest, expected: Mapping[str, Any]) -> tuple[Manifest, int]:
    """For a policy with a tied head: the manifest without the head, and the head's index. Else the manifest and -1.

    Raises TransportError for a tied head that differs from the embedding.
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
    """Collects one version.

    Args:
        manifest: the tensors that will arrive, without a tied head (`without_tied_head`).
        expected: name -> (dtype, shape) the serving policy accepts. Raises TransportError where the manifest differs.
        needed: the names whose chunks will come; None for all.
        room: makes the arrays to receive into, of a (dtype, shape) by name; it may return None.
    """

    def __init__(self, manifest: Manifest, expected: Mapping[str, Form], needed: Collection[str] | None = None,
                 room: Callable[[Mapping[str, Form]], Mapping[str, np.ndarray] | None] | None = None) -> None:
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
        self._needed = frozenset(found if needed is None else needed)
        forms = {name: form for name, form in found.items() if name in self._needed}
        self._room = (room(forms) if room is not None and forms else None) or {}
        self._index = self._offset = 0
        self._failed = False
        self._arrays: list[np.ndarray | None] = []
        self._begin()

    def add(self, index: int, offset: int, data: Buffer) -> None:
        """Takes the next chunk. Raises TransportError for a gap, a repeat, an overrun, a wrong digest or a number that
        is not finite; the stage has then failed."""
        try:
            self._add(index, offset, data)
        except TransportError:
            self._failed = True
            self._arrays.clear()
            self._room = {}
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
        flat_bytes(self._array(index))[offset:end] = data
        self._hash.update(data)
        self._check_finite(spec, offset, end)
        self._offset, self.received = end, self.received + 1
        if end == spec.size:
            self._end()
            self._index, self._offset = index + 1, 0
            self._begin()

    def finish(self) -> dict[str, np.ndarray]:
        """Returns every array that was needed by name, once. Raises TransportError when something is missing."""
        if self._failed or self._index < len(self.manifest.tensors):
            raise refuse("weights", f"{len(self.manifest.tensors) - self._index} tensors are missing or incomplete")
        self._failed = True
        arrays, self._arrays, self._room = self._arrays, [], {}
        return {t.name: a for t, a in zip(self.manifest.tensors, arrays, strict=True) if a is not None}

    def _begin(self) -> None:
        """Finds the memory of the next tensor that is needed. A tensor without bytes is complete at once."""
        while self._index < len(self.manifest.tensors):
            spec = self.manifest.tensors[self._index]
            if spec.name in self._needed:
                own = self._room.get(spec.name)
                self._arrays.append(np.empty(spec.shape, storage_dtype(spec.dtype)) if own is None else own)
                self._hash = new_digest()
                if spec.size:
                    return
                self._end()
            else:
                self._arrays.append(None)
            self._index += 1

    def _array(self, index: int) -> np.ndarray:
        array = self._arrays[index]
        assert array is not None, "a chunk of a tensor that is not needed"
        return array

    def _check_finite(self, spec: TensorSpec, start: int, end: int) -> None:
        """Checks the numbers whose last byte is within start..end-1."""
        flat = self._array(self._index).reshape(-1)
        first = start // flat.itemsize
        finite = finite_mask(flat[first:end // flat.itemsize], spec.dtype)
        if not finite.all():
            place = tuple(int(i) for i in np.unravel_index(first + int(finite.argmin()), spec.shape))
            raise TransportError(f"weight version {self.manifest.version}: {spec.name!r} is not finite at {list(place)}; "
                                 "push numbers; the version before it serves on")

    def _end(self) -> None:
        spec = self.manifest.tensors[self._index]
        if self._hash.digest() != spec.digest:
            raise TransportError(f"weight version {self.manifest.version}: the bytes of {spec.name!r} do not have the "
                                 "digest of the manifest; push the version again")
