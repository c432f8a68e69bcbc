"""Files that are either whole or absent.

Invariants:
- A file written here appears under its name only when all of it is on disk; after a full disk, a missing permission or
  a kill, the name holds what it held before.
- Lines appended here are whole or absent: what a failed append left behind is cut off again.
- An output is a regular file at its real path: a symbolic link stays, and what it points to is replaced. A pipe is written to
  once all is known. A device or a socket is refused.
- A temporary file is locked while its writer lives. What a killed writer left is removed by the next one of the same output.
- Whatever the operating system refuses comes out as one `StorageError` that names the path and what to do.

Standard library, `errors`, `inputs` and `storage` only; any floor above `kernels` may use it.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import StorageError
from .inputs import kind_of
from .storage import STEM, lock, lock_of, locked_directory, locked_name, make_directory, storage_error, storing

__all__ = [
    "append_jsonl", "check_directory", "check_output", "locked_directory", "locked_name", "make_directory", "storage_error",
    "storing", "whole_directory", "whole_file", "write_atomic", "write_json",
]  # fmt: skip

_HERE, _RENAME_EXCHANGE = -100, 2  # of <fcntl.h> and <linux/fs.h>: relative to the working directory; swap two names


def check_output(path: str | os.PathLike[str], *others: str | os.PathLike[str]) -> None:
    """Refuses an output before the work for it: one that `whole_file` would refuse, or that is one of `others` (inputs, or other
    outputs). Creates nothing.

    Raises:
        StorageError: it cannot be written.
    """
    target = _real(path)
    for other in others:
        one = os.path.realpath(other)
        if one == os.fspath(target) or (target.exists() and os.path.exists(one) and target.samefile(one)):
            raise StorageError(f"{os.fspath(path)}: stands for two files of this command; give the output a name of its own")
    with storing(path):
        if _pipe(path) is None:
            _check_writable(target.parent)


def check_directory(path: str | os.PathLike[str]) -> None:
    """Refuses the directory of an output before the work for it, as `check_output` does for a file. Creates nothing."""
    target = Path(os.path.realpath(path))
    with storing(path):
        if (target.exists() or target.is_symlink()) and not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is not a directory")
        _check_writable(target if target.is_dir() else target.parent)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; when the block ends well, what was written there becomes `path`.

    The temporary name keeps the suffix, by which some writers choose a format. Parents are created. Where `path` is a pipe, what
    was written goes into it at the end.

    Raises:
        StorageError: the file could not be written whole; `path` is as it was before.
    """
    with storing(path):
        pipe = _pipe(path)
        if pipe is not None:
            with os.fdopen(pipe, "wb") as reader, tempfile.TemporaryDirectory() as place:
                temporary = Path(place) / f"part{Path(path).suffix}"
                temporary.touch()
                yield temporary
                with open(temporary, "rb") as written:
                    shutil.copyfileobj(written, reader)
            return
        target = _real(path)
        make_directory(target.parent)
        descriptor, temporary = _temporary(target)
        try:
            yield temporary
            with open(temporary, "rb+") as written:
                os.fsync(written.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, target)
            _sync_directory(target.parent)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(descriptor)


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes `data`, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def whole_directory(path: str | os.PathLike[str], owned: Callable[[str], bool] = lambda name: True) -> Iterator[Path]:
    """Yields an empty directory beside `path`; when the block ends well, it takes the place of `path` in one step.

    Args:
        owned: which names of the old directory, if there is one, go with it. Others are carried over.

    Raises:
        StorageError: the directory could not be written whole; `path` is as it was before.
    """
    target = Path(os.path.realpath(path))
    make_directory(target.parent)
    with storing(target):
        if (target.exists() or target.is_symlink()) and not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file")
        descriptor, staging = _temporary(target, directory=True)
        try:
            os.chmod(staging, 0o777 & ~_umask())
            yield staging
            _publish(staging)
            if target.is_dir():
                for old in target.iterdir():
                    if not owned(old.name) and not (staging / old.name).exists():
                        _link(old, staging / old.name)
            for folder, _, names in os.walk(staging):
                for name in names:
                    with open(os.path.join(folder, name), "rb") as written:
                        os.fsync(written.fileno())
                _sync_directory(Path(folder))
            if target.exists():
                _exchange(staging, target)
            else:
                os.rename(staging, target)
            _sync_directory(target.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            os.close(descriptor)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON, whole or not at all; NaN and infinities are refused (`ValueError`)."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def append_jsonl(path: str | os.PathLike[str], *values: Any) -> None:
    """Appends one JSON line per value and flushes them to disk; lines that did not all fit are cut off again.

    NaN and infinities are refused (`ValueError`).
    """
    lines = b"".join(json.dumps(value, allow_nan=False).encode() + b"\n" for value in values)
    make_directory(Path(path).parent)
    with storing(path), open(path, "ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(lines):
                written += file.write(lines[written:])
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def _real(path: str | os.PathLike[str]) -> Path:
    """Where the path leads through symbolic links. Raises StorageError where a link leads back to itself, or to something that
    is neither a regular file nor a pipe."""
    with storing(path):
        target = Path(os.path.realpath(path))
        try:
            kind = kind_of(os.stat(path).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            kind = None
        if kind is not None and kind != "a pipe":
            raise OSError(errno.EINVAL, f"it is {kind}, not a file")
        return target


def _check_writable(folder: Path) -> None:
    """Raises OSError where nothing can be made in the folder, or in the nearest one above it that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{folder} is not a directory")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "no permission")


def _pipe(path: str | os.PathLike[str]) -> int | None:
    """The writing end of the pipe at `path`; None where it is none. Raises OSError where nobody reads it."""
    try:
        if not stat.S_ISFIFO(os.stat(path).st_mode):
            return None
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise OSError(errno.ENXIO, "it is a pipe that nobody reads") from error
    os.set_blocking(descriptor, True)
    return descriptor


def _temporary(target: Path, directory: bool = False) -> tuple[int, Path]:
    """A new file or directory beside `target`, locked by the descriptor. Those that no living writer holds are removed."""
    prefix, suffix = f".{(target.name if directory else target.stem)[:STEM]}-", ".part" + ("" if directory else target.suffix)
    for stale in target.parent.glob(f"{glob.escape(prefix)}????????{glob.escape(suffix)}"):
        if (descriptor := lock_of(stale)) is not None:
            if stale.is_dir():
                shutil.rmtree(stale, ignore_errors=True)
            else:
                stale.unlink(missing_ok=True)
            os.close(descriptor)
    while True:
        if directory:
            path = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=target.parent))
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        else:
            descriptor, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=target.parent)
            path = Path(name)
        # Another writer that sweeps may have taken it before it was locked; then there is none under this name.
        if lock(descriptor, path):
            return descriptor, path
        os.close(descriptor)


def _link(old: Path, new: Path) -> None:
    if old.is_dir() and not old.is_symlink():
        shutil.copytree(old, new, symlinks=True)
        return
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:  # not every file system has hard links
        shutil.copy2(old, new, follow_symlinks=False)


def _exchange(one: Path, other: Path) -> None:
    """Two paths change names: in one step where the system can (Linux), else with a moment in which `other` is absent."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if swap is not None and swap(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return
    aside = one.with_name(one.name + ".old")
    os.rename(other, aside)
    os.rename(one, other)
    os.rename(aside, one)


def _publish(directory: Path) -> None:
    """Give all that is in a directory the usual permissions: some writers (mkstemp, safetensors) make private files."""
    mask = _umask()
    for folder, folders, names in os.walk(directory):
        for name in names:
            path = os.path.join(folder, name)
            if not os.path.islink(path):
                os.chmod(path, 0o666 & ~mask)
        for name in folders:
            os.chmod(os.path.join(folder, name), 0o777 & ~mask)


def _umask() -> int:
    # There is no call that only reads it.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
