"""Weights in memory of the pool's process that engines of the same host map.

Invariants:
- The memory has no name in any file system: it is freed when the last process that maps it ends, however that ends.
- An engine finds it through the pool's process, and checks a random mark, so one on another host is refused.
- A tensor that did not change stays where it is. When less than half of a piece of memory is still in use, what is in use moves
  with the next version, so the tensors of one version take at most twice their size.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import ClusterError
from .weight_transport import Arrays, Form, SharedTransport

_MARK = 32
"""Bytes of the random mark at the beginning of a piece."""
_ALIGN = 64
"""Tensors begin at multiples of so many bytes: a cache line, the widest vector, and what Ray's object store does."""


class Piece(mmap.mmap):
    """Memory that other processes can map by `path`, for as long as this process has an array in it."""

    fd: int
    mark: bytes

    @classmethod
    def of(cls, size: int) -> Piece:
        """Raises ClusterError: there is no room."""
        try:
            fd = os.memfd_create("blockroll-weights", os.MFD_CLOEXEC)
            os.ftruncate(fd, size)
            piece = cls(fd, size)
        except OSError as error:
            raise ClusterError(f"weights: the version finds no room in shared memory ({error.strerror}); "
                               "the old one serves") from error
        piece.fd, piece.mark = fd, secrets.token_bytes(_MARK)
        piece[:_MARK] = piece.mark
        return piece

    @property
    def path(self) -> str:
        """Where other processes of the host and the user open it."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


@dataclass(frozen=True)
class Place:
    """A tensor in a piece."""

    path: str
    mark: bytes
    offset: int
    dtype: str
    shape: tuple[int, ...]


class SharedTicket:
    """Places of tensors. In the pool's process it keeps their memory."""

    def __init__(self, places: Mapping[str, Place], arrays: Arrays | None = None) -> None:
        self._places, self._arrays = dict(places), arrays

    def __reduce__(self) -> tuple[type[SharedTicket], tuple[Mapping[str, Place]]]:
        return SharedTicket, (self._places,)

    def read(self) -> Arrays:
        """The arrays, which lie in the pool's memory. Raises ClusterError where that is on another host."""
        pieces: dict[str, mmap.mmap] = {}
        found = {}
        for name, place in self._places.items():
            if place.path not in pieces:
                pieces[place.path] = _mapped(place)
            found[name] = np.ndarray(place.shape, place.dtype, pieces[place.path], place.offset)
        return found


def _mapped(place: Place) -> mmap.mmap:
    try:
        with open(place.path, "rb") as file:
            piece = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    except (OSError, ValueError):
        piece = None
    if piece is None or piece[:_MARK] != place.mark:
        raise ClusterError("weights.transport: 'shared_memory' reaches no engine on another host, or of another user; use 'ray'")
    return piece


class SharedMemoryTransport(SharedTransport):
    """See `WeightTransport`."""

    def ticket(self, held: Mapping[str, Any]) -> SharedTicket:
        """To places in the gateway's memory."""
        return _ticket(held)

    def room(self, forms: Mapping[str, Form]) -> Arrays:
        """See `WeightTransport`."""
        dtypes = {name: np.dtype("uint16" if dtype == "bfloat16" else dtype) for name, (dtype, _) in forms.items()}
        end, offsets = _MARK, {}
        for name, (_, shape) in forms.items():
            offsets[name] = -(-end // _ALIGN) * _ALIGN
            end = offsets[name] + int(np.prod(shape, dtype=np.int64)) * dtypes[name].itemsize
        piece = Piece.of(end)
        return {name: np.ndarray(shape, dtypes[name], piece, offsets[name]) for name, (_, shape) in forms.items()}

    def stage(self, arrays: Arrays, changed: Collection[str]) -> None:
        """See `WeightTransport`. Arrays of `room` are not copied."""
        kept = {name: array for name, array in (self._serving or {}).items() if name not in changed}
        used: Counter[int] = Counter()
        for array in kept.values():
            used[id(array.base)] += array.nbytes
        given = {name: array for name, array in arrays.items() if name in changed}
        moved = {name: array for name, array in kept.items() if 2 * used[id(array.base)] < len(_piece(array))}
        foreign = {name: array for name, array in (given | moved).items() if name in moved or not isinstance(array.base, Piece)}
        own = self.room({name: (array.dtype.name, array.shape) for name, array in foreign.items()}) if foreign else {}
        for name, array in foreign.items():
            np.copyto(own[name], array)
        self._staged, self._changed = {**kept, **given, **own}, changed


def _piece(array: np.ndarray) -> Any:
    piece = array.base
    assert isinstance(piece, Piece), "an array that lies in no piece"
    return piece


def _ticket(arrays: Arrays) -> SharedTicket:
    places = {}
    for name, array in arrays.items():
        piece = _piece(array)
        start = np.frombuffer(piece, np.uint8).__array_interface__["data"][0]
        offset = array.__array_interface__["data"][0] - start
        places[name] = Place(piece.path, piece.mark, offset, array.dtype.name, array.shape)
    return SharedTicket(places, arrays)
