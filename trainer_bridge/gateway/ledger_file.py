"""The SQLite file of a ledger: its tables, its transactions, and its errors as StorageError.

Invariants:
- One process holds the file at a time. The lock ends with its process.
- A transaction is on disk when it ends, or it has changed nothing and raises StorageError. One that is not `durable` is on disk
  after the next `sync`, or the next durable one; until then a power cut may undo it, and the end of a process may not.
- What a transaction recorded is in the file that has the ledger's name: after each one, and in `check`, a file that was
  deleted or replaced raises StorageError.
- Every statement finds its rows by an index. Partial indices hold open work alone, so they stay small however many
  requests were answered. SQLite uses a partial index only in a statement that repeats its condition (`OPEN`, `SETTLED`,
  `UNACKED`).
- Pages of deleted rows are used again. When most of a large file is free, pages are returned to the disk in steps.
"""

from __future__ import annotations

import os
import sqlite3
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ...errors import StorageError

PAUSED, STAGED, QUEUED, LEASED, DONE, FAILED = range(-1, 5)
OPEN, SETTLED, UNACKED = "state<3", "settled=1", "acked=0"
COUNTERS = ("requested", "unique", "failed", "acknowledged", "duplicates", "stale", "kept")

_FORMAT = 3
_SCHEMA = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE counters (id INTEGER PRIMARY KEY, {", ".join(f"[{name}] INTEGER NOT NULL DEFAULT 0" for name in COUNTERS)});
CREATE TABLE clients (client TEXT PRIMARY KEY, key TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE versions (version INTEGER PRIMARY KEY, digest BLOB NOT NULL);
CREATE TABLE requests (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, client TEXT NOT NULL, batch TEXT NOT NULL, place INTEGER NOT NULL,
    digest BLOB NOT NULL, samples INTEGER NOT NULL, state INTEGER NOT NULL, epoch INTEGER NOT NULL DEFAULT 0,
    recorded INTEGER NOT NULL DEFAULT 0, acked INTEGER NOT NULL DEFAULT 0, settled INTEGER NOT NULL DEFAULT 0,
    payload BLOB);
CREATE INDEX open_requests ON requests (state, seq) WHERE {OPEN};
CREATE INDEX open_batches ON requests (state, client, batch, place) WHERE {OPEN};
CREATE INDEX open_leases ON requests (state, epoch) WHERE {OPEN};
CREATE INDEX settled_requests ON requests (settled, seq) WHERE {SETTLED};
CREATE TABLE trajectories (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, request_id TEXT NOT NULL, sample INTEGER NOT NULL, client TEXT NOT NULL,
    acked INTEGER NOT NULL DEFAULT 0, payload BLOB, UNIQUE (request_id, sample));
CREATE INDEX unacknowledged ON trajectories (client, seq) WHERE {UNACKED};
CREATE INDEX unacknowledged_of_request ON trajectories (request_id) WHERE {UNACKED};
INSERT INTO counters (id) VALUES (1);
"""
# Also made in files that were written without it.
_INDEX_OF_TURNS = f"CREATE INDEX IF NOT EXISTS open_clients ON requests (state, client, seq) WHERE {OPEN}"
_SPARE_PAGES, _GIVE_BACK = 4096, 256
_sync = getattr(os, "fdatasync", os.fsync)


class LedgerFile:
    """One SQLite file.

    Args: path: the file; its folder must exist. WAL and synchronous FULL: what a transaction recorded survives a power
        cut. max_bytes: refuse to grow beyond this (StorageError); None for as much as the disk holds. make: whether a file
        that is no ledger becomes one; otherwise it raises StorageError and stays as it is.
    """

    def __init__(self, path: str | Path, max_bytes: int | None, make: bool = True) -> None:
        self.path = Path(path)
        self._log = self.path.with_name(self.path.name + "-wal")
        self._files: dict[Path, tuple[int, int]] = {}
        name = str(self.path) if make else f"{self.path.absolute().as_uri()}?mode=rw"
        self._synced_log: int | None = None
        self._full, self._unsynced = True, False
        self._lost: StorageError | None = None
        try:
            self._db = sqlite3.connect(name, isolation_level=None, check_same_thread=False, timeout=0.5, uri=not make)
        except sqlite3.Error as error:
            raise self._storage(error) from error
        try:
            with self.guard():
                self._open(max_bytes, make)
        except BaseException:
            self._db.close()
            raise

    def _open(self, max_bytes: int | None, make: bool) -> None:
        run = self.run
        # The lock is held from the first read on and released by the kernel when the process dies.
        run("PRAGMA locking_mode=EXCLUSIVE")
        if not make and not self._is_ledger():
            raise StorageError(f"ledger {self.path}: it is no ledger; name one, or a new file")
        # Takes effect in a new file only; an existing one would have to be copied.
        run("PRAGMA auto_vacuum=INCREMENTAL")
        run("PRAGMA journal_mode=WAL")
        run("PRAGMA synchronous=FULL")
        run("PRAGMA journal_size_limit=67108864")
        self._page = self.value("PRAGMA page_size")
        if max_bytes is not None:
            run(f"PRAGMA max_page_count={max(1, max_bytes // self._page)}")
        with self.transaction():
            if not self._is_ledger():
                for statement in _SCHEMA.split(";")[:-1]:
                    run(statement)
                run("INSERT INTO meta VALUES ('format', ?), ('ledger', ?), ('epoch', 0)", (_FORMAT, uuid.uuid4().hex))
            elif (found := self.meta("format")) != _FORMAT:
                raise StorageError(f"{self.path} has ledger format {found}, this version writes {_FORMAT}; "
                                   "finish it with the version that wrote it, or name a new file")
            run(_INDEX_OF_TURNS)
        self.check()
        # SQLite's own name of the log, behind symbolic links. It takes no locks on this file, which closing it would end.
        with suppress(FileNotFoundError):
            self._synced_log = os.open(run("PRAGMA database_list").fetchone()[2] + "-wal", os.O_RDONLY)

    def _is_ledger(self) -> bool:
        return self.run("SELECT 1 FROM sqlite_schema WHERE name='meta'").fetchone() is not None

    def check(self) -> None:
        """Raises StorageError when the file, or its write-ahead log, is no longer the one that was opened, or after a `sync` that
        failed: what it was to write may be lost, whatever a later one says."""
        if self._lost is not None:
            raise self._lost
        for path in (self.path, self._log):
            try:
                found = os.stat(path)
            except FileNotFoundError:
                if path not in self._files:
                    continue
                what = "was deleted"
            else:
                if self._files.setdefault(path, (found.st_dev, found.st_ino)) == (found.st_dev, found.st_ino):
                    continue
                what = "was replaced by another file"
            raise StorageError(f"ledger {self.path}: {path.name} {what} while the gateway ran; what was not delivered is lost. "
                               "Start the gateway again, with a copy of the ledger or a new one")

    def run(self, statement: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        """Executes one statement."""
        return self._db.execute(statement, values)

    def value(self, query: str, *values: object) -> Any:
        """The first column of the first row."""
        return self.run(query, values).fetchone()[0]

    def meta(self, key: str) -> Any:
        """A value of the `meta` table. Raises StorageError where its row is damaged."""
        row = self.run("SELECT value FROM meta WHERE key=?", (key,)).fetchone()
        if row is None:
            raise StorageError(f"ledger {self.path}: its row {key!r} is damaged; restore it from a copy or name a new file")
        return row[0]

    @contextmanager
    def transaction(self, durable: bool = True) -> Iterator[None]:
        """All of the block is recorded, or nothing of it is; `durable`: it is on disk at the end, not at the next `sync`."""
        full = durable or self._synced_log is None
        with self.guard():
            if full is not self._full:
                self.run(f"PRAGMA synchronous={'FULL' if full else 'NORMAL'}")
                self._full = full
            self.run("BEGIN IMMEDIATE")
            try:
                yield
                self.run("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self.run("ROLLBACK")
                raise
        self._unsynced = self._unsynced or not full  # a durable one that changed nothing has not synced
        if self._files:
            self.check()

    def sync(self) -> None:
        """Every transaction that has ended is on disk when this returns: one wait for the disk serves them all. Raises
        StorageError, as every `sync` and `check` does from then on: the kernel reports what it has lost once."""
        if self._lost is not None:
            raise self._lost
        if self._unsynced and self._synced_log is not None:
            try:
                _sync(self._synced_log)
            except OSError as error:
                self._lost = StorageError(f"ledger {self.path}: {error.strerror}; check the disk, then start again: what "
                                          "was not confirmed is submitted again")
                raise self._lost from error
            self._unsynced = False

    @contextmanager
    def guard(self) -> Iterator[None]:
        """SQLite's errors come out as StorageError."""
        try:
            yield
        except sqlite3.Error as error:
            raise self._storage(error) from error

    def size(self) -> tuple[int, int]:
        """Bytes of the file (without its write-ahead log, at most 64 MiB once it was written back), and those of them
        that are free for new rows."""
        with self.guard():
            return self._page * self.value("PRAGMA page_count"), self._page * self.value("PRAGMA freelist_count")

    def give_back(self) -> None:
        """Between transactions: returns some pages to the disk when most of a large file is free."""
        with self.guard():
            free = self.value("PRAGMA freelist_count")
            if free > _SPARE_PAGES and 2 * free > self.value("PRAGMA page_count"):
                # One step of this statement frees one page, and `execute` takes one step of what has no columns.
                self._db.executescript(f"PRAGMA incremental_vacuum({_GIVE_BACK})")

    def close(self) -> None:
        self._db.close()
        if self._synced_log is not None:
            os.close(self._synced_log)
            self._synced_log = None

    def _storage(self, error: sqlite3.Error) -> StorageError:
        remedies = {"SQLITE_FULL": "free disk space there; what was recorded before is safe",
                    "SQLITE_IOERR": "free disk space there or check the disk; what was recorded before is safe",
                    "SQLITE_BUSY": "another gateway holds it; stop that one or name another file",
                    "SQLITE_CANTOPEN": "create its folder and make it writable",
                    "SQLITE_READONLY": "make it writable", "SQLITE_NOTADB": "name a ledger or a new file",
                    "SQLITE_CORRUPT": "restore it from a copy or name a new file"}
        name = getattr(error, "sqlite_errorname", "") or ""
        remedy = next((r for n, r in remedies.items() if name.startswith(n)), "check the disk under it")
        return StorageError(f"ledger {self.path}: {error}; {remedy}")
