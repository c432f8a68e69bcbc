"""The weight version that serves, whole in a file beside the ledger, so that a service comes back at the version it had.

Invariants:
- `LEDGER.weights-V` has its name only when all of version V is on disk. Which file counts is said by the ledger alone, in the
  one write that makes a version the last committed one; any other file is left over and removed.
- What is read is checked as what a trainer pushes is: the manifest by the digest in the ledger, each tensor by the manifest's.

What it costs: a push is written while it arrives, and a thread beside has the disk take it in pieces, so it goes at the pace of
the network or the disk, whichever is slower (17 GB: 9 s at 2 GB/s). What the disk has not taken at the end, one piece or so, is
waited for before the engines take the version, while samples in flight go on; for 8 MB that is all of it, tens of milliseconds.
The disk holds two versions for the time of a push and one otherwise.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from ..errors import StorageError, TransportError
from ..files import storing
from .codec import Buffer
from .messages import MAX_CHUNK, MAX_MANIFEST
from .weights import Manifest, WeightStager

PIECE = 64 << 20
"""Bytes written between two calls that have the disk take them."""
_LENGTH = struct.Struct("<Q")


class KeptVersions:
    """The files of weight versions beside the ledger at `ledger`."""

    def __init__(self, ledger: str | Path) -> None:
        self._ledger = Path(ledger)

    def path(self, version: int) -> Path:
        """Where a version is kept."""
        return self._ledger.with_name(f"{self._ledger.name}.weights-{version}")

    def begin(self, manifest: Manifest) -> VersionFile:
        """A file for a version that is about to arrive. Raises StorageError."""
        return VersionFile(self.path(manifest.version), manifest)

    def load(self, version: int, digest: bytes, expected: Mapping[str, tuple[str, tuple[int, ...]]]
             ) -> dict[str, np.ndarray]:
        """Every array of a version, checked; `expected` as in WeightStager.

        Raises StorageError that names the file and what is wrong with it.
        """
        path = self.path(version)
        try:
            with open(path, "rb") as file:
                head = file.read(_LENGTH.size)
                length = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else 0
                manifest = Manifest.decode(file.read(min(length, MAX_MANIFEST)))
                if manifest.digest != digest:
                    raise TransportError("its manifest is not the one that was committed")
                stager = WeightStager(manifest, expected)
                for index, spec in enumerate(manifest.tensors):
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
                # One that cannot be removed costs room and nothing else.
                with suppress(OSError):
                    path.unlink()


class VersionFile:
    """A version on its way to the disk; `seal` gives it its name."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path, self._part = path, path.with_name(path.name + ".part")
        self._written, self._syncing = 0, Future[None]()
        self._syncing.set_result(None)
        self._beside: ThreadPoolExecutor | None = None
        record = manifest.encode()
        with storing(self._path):
            self._file = open(self._part, "wb")  # noqa: SIM115 - closed by seal or discard
        try:
            self.write(_LENGTH.pack(len(record)) + record)
        except BaseException:
            self.discard()
            raise

    def write(self, data: Buffer) -> None:
        """The next bytes of the tensors, in the manifest's order. Raises StorageError."""
        with storing(self._path):
            self._file.write(data)
            self._written += len(data)
            if self._written >= PIECE and self._syncing.done():
                self._syncing.result()
                self._written = 0
                self._file.flush()
                self._beside = self._beside or ThreadPoolExecutor(1, "blockroll-weights")
                self._syncing = self._beside.submit(os.fdatasync, self._file.fileno())

    def seal(self) -> None:
        """Waits until all of it is on disk and gives it its name. Raises StorageError."""
        with storing(self._path):
            self._syncing.result()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._close()
            os.replace(self._part, self._path)
            folder = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def discard(self) -> None:
        """Leaves nothing of a version that was not sealed; safe to call twice."""
        with suppress(OSError):
            self._close()
        with suppress(OSError):
            self._part.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._beside is not None:
            self._beside.shutdown()
        self._file.close()
