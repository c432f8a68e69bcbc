"""The file that says which process serves a ledger and where it answers.

Invariants:
- `LEDGER.service` lies beside the ledger. A living service holds a lock on it, which ends with the service's process, however
  that ends. So a file without a lock is stale. The next service of the ledger takes it over.
- A reader gets the record of a living service, or nothing: a stale file is emptied under a lock that readers share, by which
  they see that nobody lives, and only then is the service's own lock taken. A start waits for readers.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from ..errors import StorageError
from ..files import make_directory, storing

_READERS_S = 1.0
"""Seconds a start waits for readers to let go of the file; each holds it for less than a millisecond."""


@dataclass(frozen=True)
class ServiceRecord:
    """One service.

    Attributes:
        pid: process of the gateway; 0 for a service that has not written its record yet.
        state: starting, or ready to answer.
        address: of the gateway; empty while it starts.
        keys: directory of CURVE keys; None without.
        http: base URL of the HTTP face; None without.
        metrics: URL of the Prometheus metrics; None without.
        log: file that a detached service writes to; None for a service in a terminal.
        policy: as the configuration names it.
        started: seconds since the epoch.
    """

    pid: int
    state: Literal["starting", "ready"] = "starting"
    address: str = ""
    keys: str | None = None
    http: str | None = None
    metrics: str | None = None
    log: str | None = None
    policy: str = ""
    started: float = 0.0


class RuntimeFile:
    """The open and locked file of this process's service."""

    def __init__(self, descriptor: int, path: Path, record: ServiceRecord) -> None:
        self._descriptor, self.path, self.record = descriptor, path, record
        self._write()

    def update(self, **changes: object) -> None:
        """Changes fields of the record."""
        self.record = replace(self.record, **changes)  # type: ignore[arg-type]
        self._write()

    def _write(self) -> None:
        # Blanks behind the record hide what a longer one left, so a reader never meets a mixture.
        text = json.dumps(asdict(self.record)).encode()
        with storing(self.path):
            size = os.fstat(self._descriptor).st_size
            os.pwrite(self._descriptor, text.ljust(size), 0)


def path_beside(ledger: Path) -> Path:
    """The runtime file of the service of a ledger."""
    return ledger.with_name(f"{ledger.name}.service")


def log_beside(ledger: Path) -> Path:
    """Where a detached service of a ledger writes its log."""
    return ledger.with_name("service.log")


@contextmanager
def held(ledger: Path, record: ServiceRecord) -> Iterator[RuntimeFile]:
    """Holds the ledger's runtime file for a service of this process; removes the file when the block ends.

    Raises:
        StorageError: another service of this ledger runs.
    """
    path = path_beside(ledger)
    make_directory(path.parent)
    end = time.monotonic() + _READERS_S
    while True:
        with storing(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)  # no service holds it
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            if read(ledger) is not None or time.monotonic() > end:
                raise StorageError(already_up(ledger)) from error
            time.sleep(0.001)
            continue
        if _is_at(descriptor, path) and not os.fstat(descriptor).st_size:
            break
        os.close(descriptor)  # between the two locks a service has come and gone
    try:
        yield RuntimeFile(descriptor, path, replace(record, started=time.time()))
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def read(ledger: Path) -> ServiceRecord | None:
    """The living service of a ledger; None when there is none."""
    try:
        descriptor = os.open(path_beside(ledger), os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        if not _lives(descriptor):
            return None
        text = os.pread(descriptor, 1 << 20, 0)
        if not _lives(descriptor):
            return None
        return ServiceRecord(**json.loads(text)) if text.strip() else ServiceRecord(0)
    finally:
        os.close(descriptor)


def read_written(ledger: Path, seconds: float = 2.0) -> ServiceRecord | None:
    """As `read`, and waits for a service that starts to write its record.

    Raises:
        StorageError: it does not within `seconds`.
    """
    end = time.monotonic() + seconds
    while (found := read(ledger)) is not None and found.pid == 0:
        if time.monotonic() > end:
            raise StorageError(f"service: a process holds {path_beside(ledger)} and has not written which it is; try again")
    return found


def already_up(ledger: Path) -> str:
    """Says that the service of a ledger runs, and where."""
    found = read(ledger)
    if found is None:
        return f"service: another process holds {path_beside(ledger)}; try again"
    where = f"is up at {found.address}" if found.address else "is starting"
    return (f"service: the service of {ledger} {where} (process {found.pid}); look at it with `blockroll status`, stop it with "
            "`blockroll down`")


def _lives(descriptor: int) -> bool:
    """Whether a service holds the open file."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one of that name."""
    try:
        named = os.stat(path)
    except FileNotFoundError:
        return False
    return (named.st_dev, named.st_ino) == (os.fstat(descriptor).st_dev, os.fstat(descriptor).st_ino)
