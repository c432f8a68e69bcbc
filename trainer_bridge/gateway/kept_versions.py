"""Keeps the weight version that serves in a file beside the ledger, so that a restarted service serves the same
version.

Invariants:
- `LEDGER.weights-V` gets its name when all of version V is on disk. The ledger alone says which version was committed
  last; the file of any other version is removed.
- A file holds every tensor of its version. One that did not change is copied from the file of the version before.
- A file is checked as a push is: the manifest against the digest in the ledger, each tensor against the digest in the
  manifest.

A file is the length of the manifest, the manifest, and the tensors, each at a multiple of 64 bytes.

Cost: a push is written while it arrives, and a second thread syncs it to disk in pieces, so a push takes as long as the
slower of network and disk (17 GB: 9 s at 2 GB/s). What is not synced at the end, about one piece, is synced before the
engines take the version, while samples in flight go on; 8 MB take tens of milliseconds. The disk holds two versions
during a push, one otherwise.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ...errors import StorageError, TransportError
from ...files import storing
from ..wire.codec import Buffer
from ..wire.limits import MAX_CHUNK, MAX_MANIFEST
from ..wire.manifest import Manifest, TensorSpec, storage_dtype
from .weight_stager import WeightStager

PIECE = 64 << 20
"""Bytes written between two syncs, and the longest copy after which a thread looks whether it should go on."""
_LENGTH = struct.Struct("<Q")
_ALIGN = 64
"""Arrays over the file's memory begin where every dtype may."""


def _places(manifest: Manifest) -> tuple[list[int], int]:
    """Where each tensor of a file begins, and where the file ends."""
    places, end = [], _LENGTH.size + len(manifest.encode())
    for spec in manifest.tensors:
        places.append(-(-end // _ALIGN) * _ALIGN if spec.size else end)
        end = places[-1] + spec.size
    return places, end


class KeptVersions:
    """The files of weight versions beside the ledger at `ledger`."""

    def __init__(self, ledger: str | Path) -> None:
        self._ledger = Path(ledger)

    def path(self, version: int) -> Path:
        """The file of a version."""
        return self._ledger.with_name(f"{self._ledger.name}.weights-{version}")

    def begin(self, manifest: Manifest, base: Manifest | None = None, kept: Collection[str] = ()) -> VersionFile:
        """A file for a version that is about to arrive. Raises StorageError.

        Args: kept: names of tensors that are taken from the file of `base` and will not arrive.
        """
        return VersionFile(self.path(manifest.version), manifest, None if base is None else self.path(base.version), base, kept)

    def manifest(self, version: int, digest: bytes | None) -> Manifest | None:
        """The manifest of a version whose file is whole, and has this digest; None without one."""
        try:
            with open(self.path(version), "rb") as file:
                manifest = _manifest(file)
                whole = manifest.digest == digest and os.fstat(file.fileno()).st_size == _places(manifest)[1]
        except (OSError, TransportError):
            return None
        return manifest if whole else None

    def mapped(self, manifest: Manifest, names: Collection[str]) -> dict[str, np.ndarray]:
        """Tensors of the file of this manifest, not read yet; valid after the file was removed, too. Raises
        StorageError."""
        with storing(self.path(manifest.version)), open(self.path(manifest.version), "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return {spec.name: np.ndarray(spec.shape, storage_dtype(spec.dtype), memory, place)
                for spec, place in zip(manifest.tensors, _places(manifest)[0], strict=True) if spec.name in names}

    def load(self, version: int, digest: bytes, expected: Mapping[str, tuple[str, tuple[int, ...]]]
             ) -> dict[str, np.ndarray]:
        """Every array of a version, checked; `expected` as in WeightStager.

        Raises StorageError that names the file and what is wrong with it.
        """
        path = self.path(version)
        try:
            with open(path, "rb") as file:
                manifest = _manifest(file)
                if manifest.digest != digest:
                    raise TransportError("its manifest is not the one that was committed")
                stager = WeightStager(manifest, expected)
                places, end = _places(manifest)
                if os.fstat(file.fileno()).st_size != end:
                    raise TransportError(f"it has {os.fstat(file.fileno()).st_size} bytes, its manifest says {end}")
                for index, spec in enumerate(manifest.tensors):
                    file.seek(places[index])
                    for offset in range(0, spec.size, MAX_CHUNK):
                        data = file.read(min(MAX_CHUNK, spec.size - offset))
                        if not data:
                            raise TransportError(f"it ends within {spec.name!r}")
                        stager.add(index, offset, data)
                return stager.finish()
        except FileNotFoundError:
            raise StorageError(f"{path} is missing") from None
        except OSError as error:
            raise StorageError(f"{path} cannot be read ({error.strerror})") from error
        except TransportError as error:
            raise StorageError(f"{path} cannot be used ({error})") from error

    def sweep(self, keep: int | None) -> None:
        """Removes every file but that of version `keep`."""
        prefix = self.path(0).name[:-1]
        for path in self._ledger.parent.iterdir():
            if path.name.startswith(prefix) and (keep is None or path != self.path(keep)):
                # A file that cannot be removed takes room and does no other harm.
                with suppress(OSError):
                    path.unlink()


def _manifest(file: BinaryIO) -> Manifest:
    head = file.read(_LENGTH.size)
    length = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else 0
    return Manifest.decode(file.read(min(length, MAX_MANIFEST)))


class VersionFile:
    """The file of a version that is arriving. `seal` syncs it and gives it its name.

    Args: base_path, base: the file and manifest of the version that serves. kept: names of tensors that are copied from it.
    """

    def __init__(self, path: Path, manifest: Manifest, base_path: Path | None = None, base: Manifest | None = None,
                 kept: Collection[str] = ()) -> None:
        self._path, self._part = path, path.with_name(path.name + ".part")
        self._written, self._syncing, self._copied = 0, Future[None](), Future[None]()
        self._syncing.set_result(None)
        self._copied.set_result(None)
        self._beside: ThreadPoolExecutor | None = None
        self._dropped = False
        record = manifest.encode()
        self._places, end = _places(manifest)
        with storing(self._path):
            self._file = open(self._part, "wb", buffering=0)  # noqa: SIM115 - closed by seal or discard
        try:
            with storing(self._path):
                self._file.truncate(end)
                self._write(0, _LENGTH.pack(len(record)) + record)
                if kept:
                    assert base is not None and base_path is not None
                    self._copy(base_path, {spec.name: place for spec, place in zip(base.tensors, _places(base)[0], strict=True)},
                               [(spec, place) for spec, place in zip(manifest.tensors, self._places, strict=True)
                                if spec.name in kept])
        except BaseException:
            self.discard()
            raise

    def write(self, index: int, offset: int, data: Buffer) -> None:
        """Bytes of tensor `index` of the manifest, from `offset` on. Raises StorageError."""
        with storing(self._path):
            self._write(self._places[index] + offset, data)
            self._written += len(data)
            if self._written >= PIECE and self._syncing.done():
                self._syncing.result()
                self._written = 0
                self._syncing = self._submit(lambda: os.fdatasync(self._file.fileno()))

    def _write(self, place: int, data: Buffer) -> None:
        rest = memoryview(data)
        while rest:
            done = os.pwrite(self._file.fileno(), rest, place)
            place, rest = place + done, rest[done:]

    def _submit(self, work: Callable[[], None]) -> Future[None]:
        self._beside = self._beside or ThreadPoolExecutor(1, "blockroll-weights")
        return self._beside.submit(work)

    def _copy(self, source: Path, from_: Mapping[str, int], tensors: Sequence[tuple[TensorSpec, int]]) -> None:
        """Copies tensors from another version's file, in a thread."""
        source_fd = os.open(source, os.O_RDONLY)

        def copy() -> None:
            try:
                for spec, place in tensors:
                    os.lseek(self._file.fileno(), place, os.SEEK_SET)
                    done = 0
                    while done < spec.size and not self._dropped:
                        count = os.sendfile(self._file.fileno(), source_fd, from_[spec.name] + done, min(PIECE, spec.size - done))
                        if not count:
                            raise OSError(errno.EIO, f"{source.name} ends within {spec.name!r}")
                        done += count
            finally:
                os.close(source_fd)

        self._copied = self._submit(copy)

    def seal(self) -> None:
        """Waits until the whole version is on disk and gives the file its name. Raises StorageError."""
        with storing(self._path):
            self._copied.result()
            self._syncing.result()
            os.fsync(self._file.fileno())
            self._close()
            os.replace(self._part, self._path)
            folder = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def discard(self) -> None:
        """Removes the file of a version that was not sealed; safe to call twice."""
        self._dropped = True
        with suppress(OSError):
            self._close()
        with suppress(OSError):
            self._part.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._beside is not None:
            self._beside.shutdown()
        self._file.close()
