"""Keeps the weight version that serves in a file beside the ledger, so that a restarted service serves the same
version.

Invariants:
- `LEDGER.weights-V` gets its name when all of version V is on disk. The ledger alone says which version was committed
  last; the file of any other version is removed.
- A file is checked as a push is: the manifest against the digest in the ledger, each tensor against the digest in the
  manifest.

Cost: a push is written while it arrives, and a second thread syncs it to disk in pieces, so a push takes as long as the
slower of network and disk (17 GB: 9 s at 2 GB/s). What is not synced at the end, about one piece, is synced before the
engines take the version, while samples in flight go on; 8 MB take tens of milliseconds. The disk holds two versions
during a push, one otherwise.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from ...errors import StorageError, TransportError
from ...files import storing
from ..wire.codec import Buffer
from ..wire.limits import MAX_CHUNK, MAX_MANIFEST
from ..wire.manifest import Manifest
from .weight_stager import WeightStager

PIECE = 64 << 20
"""Bytes written between two syncs."""
_LENGTH = struct.Struct("<Q")


class KeptVersions:
    """The files of weight versions beside the ledger at `ledger`."""

    def __init__(self, ledger: str | Path) -> None:
        self._ledger = Path(ledger)

    def path(self, version: int) -> Path:
        """The file of a version."""
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
                # A file that cannot be removed takes room and does no other harm.
                with suppress(OSError):
                    path.unlink()


class VersionFile:
    """The file of a version that is arriving. `seal` syncs it and gives it its name."""

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
        """Waits until the whole version is on disk and gives the file its name. Raises StorageError."""
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
        """Removes the file of a version that was not sealed; safe to call twice."""
        with suppress(OSError):
            self._close()
        with suppress(OSError):
            self._part.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._beside is not None:
            self._beside.shutdown()
        self._file.close()
