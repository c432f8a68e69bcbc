"""Files that are either whole or absent.

Invariants:
- A file written here appears under its name only when all of it is on disk; after a full disk, a missing permission or
  a kill, the name holds what it held before.
- A line appended here is whole or absent: what a failed append left behind is cut off again.
- Whatever the operating system refuses comes out as one `StorageError` that names the path and what to do.

Standard library and `errors` only; any floor above `kernels` may use it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import DataError, StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_HERE, _RENAME_EXCHANGE = -100, 2  # of <fcntl.h> and <linux/fs.h>: relative to the working directory; swap two names
_JSON_NAMES = {list: "array", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}


def storage_error(error: BaseException, path: str | os.PathLike[str] | None = None) -> StorageError | None:
    """The `StorageError` that says what `error` means for `path`; None when it is not about storage.

    Extension modules (safetensors, torch) report a full disk in the text of their own exceptions, hence the search.
    """
    if isinstance(error, StorageError):
        return error
    where = os.fspath(path) if path is not None else getattr(error, "filename", None) or "the output"
    code = error.errno if isinstance(error, OSError) else None
    if code in _FULL or "No space left on device" in str(error):
        return StorageError(f"{where}: the disk is full; free some space or write to another disk, then run again")
    if code in _FORBIDDEN:
        return StorageError(f"{where}: no permission to write here; change its permissions or write somewhere else")
    if isinstance(error, OSError) and path is not None:
        return StorageError(f"{where}: cannot be written ({error.strerror or error}); check the path")
    return None


@contextmanager
def storing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what the operating system refuses inside the block into a `StorageError` about `path`."""
    try:
        yield
    except Exception as error:
        explained = storage_error(error, path)
        if explained is None or explained is error:
            raise
        raise explained from error


def make_directory(path: str | os.PathLike[str]) -> Path:
    """Creates `path` and its parents where missing."""
    with storing(path):
        os.makedirs(path, exist_ok=True)
    return Path(path)


@contextmanager
def locked_directory(path: str | os.PathLike[str]) -> Iterator[None]:
    """Holds a directory for this process until the block ends; the system lets go of it when the process dies.

    Raises:
        StorageError: another process holds it.
    """
    with storing(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise StorageError(f"{os.fspath(path)}: another process is writing here; stop it or give another directory") from error
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; when the block ends well, what was written there becomes `path`.

    The temporary name keeps the suffix, by which some writers choose a format. Parents are created.

    Raises:
        StorageError: the file could not be written whole; `path` is as it was before.
    """
    target = Path(path)
    make_directory(target.parent)
    with storing(target):
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a directory")
        handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=f".part{target.suffix}", dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with open(temporary, "rb+") as written:
                os.fsync(written.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, target)
            _sync_directory(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


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
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file")
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=".part", dir=target.parent))
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


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON, whole or not at all; NaN and infinities are refused (`ValueError`)."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def append_jsonl(path: str | os.PathLike[str], value: Any) -> None:
    """Appends one JSON line and flushes it to disk; a line that did not fit is cut off again.

    NaN and infinities are refused (`ValueError`).
    """
    line = json.dumps(value, allow_nan=False).encode() + b"\n"
    make_directory(Path(path).parent)
    with storing(path), open(path, "ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):
                written += file.write(line[written:])
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) for each line that is not blank.

    Raises:
        DataError: the file cannot be read, or a line is not a JSON object in UTF-8.
    """
    name = os.fspath(path)
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below; only opening may fail as "cannot be read"
    except OSError as error:
        raise DataError(name, f"cannot be read ({error.strerror})", "check the path and its permissions") from error
    with file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                record = json.loads(raw)
            except (ValueError, RecursionError) as error:
                why = getattr(error, "msg", None) or getattr(error, "reason", None) or str(error)
                raise DataError(f"{name} line {number}", f"not valid JSON ({why})",
                                "write one JSON object per line") from error
            if not isinstance(record, dict):
                raise DataError(f"{name} line {number}", f"a JSON {_JSON_NAMES[type(record)]}, not an object",
                                "write one JSON object per line")
            yield number, record


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
