"""Files that a user gives: opened within bounds, and JSON lines read from them.

Invariants:
- Nothing waits for a file for ever: a named pipe without a writer, and a device, are refused.
- Bytes are counted before they are parsed. A line is read up to its limit and no further.
- Text is what UTF-8 can hold, and numbers are finite: what is read here can be written again.

Standard library and `errors` only; any floor above `kernels` may use it.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
from collections.abc import Iterator
from typing import IO, Any

from .errors import DataError

MAX_LINE = 64 << 20
"""Bytes of the longest line. A parsed line takes up to 25 times its bytes (`{},{},..`), so this one takes at most 1.6 GB; a
reader that knows what a line may hold gives a smaller limit."""
PIPE_WAIT_S = 2.0
"""Seconds in which somebody must open a named pipe to write to it."""
JSON_NAMES = {list: "array", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}
_KINDS = {stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket", stat.S_IFIFO: "a pipe",
          stat.S_IFDIR: "a directory"}  # fmt: skip


def kind_of(mode: int) -> str | None:
    """What something that is no regular file is, by its `st_mode`; None for a regular file."""
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no regular file")


def open_input(path: str | os.PathLike[str], pipes: bool = False) -> IO[bytes]:
    """A regular file, opened for reading.

    Args:
        pipes: take a pipe too. A named one must have a writer within PIPE_WAIT_S.

    Raises:
        OSError: it cannot be opened. `strerror` says why, also where the file is of a kind that is not taken.
    """
    mode = os.stat(path).st_mode
    if pipes and stat.S_ISFIFO(mode):
        return os.fdopen(_open_pipe(path), "rb")
    # Without O_NONBLOCK a pipe that has taken the file's place would be waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    kind = kind_of(os.fstat(descriptor).st_mode)
    if kind is not None:
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", os.fspath(path))
    return os.fdopen(descriptor, "rb")


def read_input(path: str | os.PathLike[str], most: int) -> bytes:
    """All of a regular file. Raises OSError where it cannot be read or holds more than `most` bytes."""
    with open_input(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EINVAL, f"it holds more than {most:,} bytes", os.fspath(path))
    return data


def unreadable(path: str | os.PathLike[str], error: OSError) -> DataError:
    """The error of a data file that could not be opened or read."""
    return DataError(os.fspath(path), f"cannot be read ({error.strerror or error})", "check the path and its permissions")


def read_lines(file: IO[bytes], name: str, most: int = MAX_LINE) -> Iterator[tuple[int, bytes]]:
    """Yields (line number from 1, bytes with the line's end) of every line.

    Raises:
        DataError: a line holds more than `most` bytes, or the file cannot be read on.
    """
    number = 0
    while True:
        number += 1
        try:
            line = file.readline(most + 1)
        except OSError as error:
            raise unreadable(name, error) from error
        if not line:
            return
        if len(line) > most:
            raise DataError(f"{name} line {number}", f"longer than {most:,} bytes",
                            "shorten it, or write one JSON object per line")
        yield number, line


def read_jsonl(path: str | os.PathLike[str], most: int = MAX_LINE) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) for each line that is not blank.

    Args:
        most: bytes of the longest line.

    Raises:
        DataError: the file cannot be read, or a line is not a JSON object in UTF-8.
    """
    name = os.fspath(path)
    try:
        file = open_input(path)
    except OSError as error:
        raise unreadable(path, error) from error
    with file:
        for number, raw in read_lines(file, name, most):
            if raw.strip():
                yield number, json_object(raw, f"{name} line {number}")


def json_object(raw: bytes, where: str) -> dict[str, Any]:
    """A line's JSON object.

    Raises:
        DataError: it is no object; or holds NaN, an infinity, half a surrogate pair or a number of thousands of digits.
    """
    try:
        # The parser itself would take half of a surrogate pair from bytes, and other encodings.
        record = json.loads(raw.decode("utf-8-sig"), parse_constant=_no_constant)
        if b"\\u" in raw:  # escapes alone can name half of a surrogate pair
            json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        why = getattr(error, "msg", None) or getattr(error, "reason", None) or str(error)
        if isinstance(error, RecursionError):
            why = "nested too deeply"
        elif isinstance(error, UnicodeEncodeError):
            why = f"half of a surrogate pair, \\u{ord(error.object[error.start]):04x}"
        elif "integer string conversion" in why:
            why = "a number of too many digits"
        raise DataError(where, f"not valid JSON ({why})", "write one JSON object per line") from error
    if not isinstance(record, dict):
        raise DataError(where, f"a JSON {JSON_NAMES[type(record)]}, not an object", "write one JSON object per line")
    return record


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _open_pipe(path: str | os.PathLike[str]) -> int:
    """The reading end of a pipe. An unnamed one opens at once, a named one when somebody opens it to write."""
    opened: list[int] = []
    thread = threading.Thread(target=lambda: opened.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC)), daemon=True)
    thread.start()
    thread.join(PIPE_WAIT_S)
    if thread.is_alive():
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))  # the thread's call returns
        thread.join()
        os.close(opened.pop())
    if not opened:
        raise OSError(errno.ENXIO, f"nobody writes to this pipe within {PIPE_WAIT_S:g} s", os.fspath(path))
    return opened[0]
