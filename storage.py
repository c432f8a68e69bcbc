"""What the operating system refuses, as one `StorageError` that names the path and what to do; and who may write where.

Invariants:
- A lock belongs to a process: the system lets go of it when the process dies, however it dies.
- An error about another file than the one being written is not told as an error of writing.

Standard library and `errors` only. `files` is the face: what others need of this module is imported from there.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
STEM = 64
"""Characters of a file's name that its temporary name and its lock repeat: a name may be as long as the system allows."""


def storage_error(error: BaseException, path: str | os.PathLike[str] | None = None) -> StorageError | None:
    """The `StorageError` that says what `error` means for `path`; None when it is not about storage.

    Extension modules (safetensors, torch) report a full disk in the text of their own exceptions, hence the search.
    """
    if isinstance(error, StorageError):
        return error
    where = os.fspath(path) if path is not None else getattr(error, "filename", None) or "the output"
    code = error.errno if isinstance(error, OSError) else None
    if code in _FORBIDDEN and path is None and not _readable(where):
        return StorageError(f"{where}: no permission to read it; change its permissions or give another path")
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
        other = isinstance(error, OSError) and error.filename is not None and not _concerns(error.filename, path)
        explained = storage_error(error, None if other else path)
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
def locked_name(path: str | os.PathLike[str]) -> Iterator[None]:
    """Holds what will be at `path`, which need not exist, for this process until the block ends. The lock is a file `.NAME.lock`
    beside it, which goes when the block ends; one that a killed process left is no lock.

    Raises:
        StorageError: another process holds it.
    """
    target = Path(os.path.realpath(path))
    beside = make_directory(target.parent) / f".{target.name[:STEM]}.lock"
    with storing(beside):
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        if not lock(descriptor, beside):
            raise StorageError(f"{os.fspath(path)}: another process is writing here; stop it or give another path")
        try:
            yield
        finally:
            beside.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def lock_of(path: Path) -> int | None:
    """A descriptor that locks what is at `path`; None where another process holds it or has removed it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    if lock(descriptor, path):
        return descriptor
    os.close(descriptor)
    return None


def lock(descriptor: int, path: Path) -> bool:
    """Locks the open file. False where another process holds it, or `path` is no longer its name."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        return False


def _concerns(name: object, path: str | os.PathLike[str]) -> bool:
    """Whether an error about the file `name` is about writing `path`: it is that file, or one under its directory."""
    if not isinstance(name, str | bytes):
        return True
    folder, named = os.path.dirname(os.path.realpath(path)), os.path.realpath(os.fsdecode(name))
    return os.path.commonpath([folder, named]) == folder


def _readable(path: str) -> bool:
    """Whether the file, and every directory above it, may be read by this process, or is not there."""
    try:
        os.stat(path)
    except PermissionError:
        return False
    except OSError:
        return True
    return os.access(path, os.R_OK)
