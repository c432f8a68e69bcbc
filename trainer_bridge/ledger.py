"""What the gateway must not forget: requests and trajectories in SQLite until the trainer acknowledges them.

Invariants:
- A request is recorded before it is acknowledged, a trajectory before it is sent; both with a write that reached the disk.
- The same request id with the same content is the same request; with other content, or from another client, it is refused.
- (request id, sample) is unique for ever: a second trajectory is dropped, also after the first was acknowledged. An
  acknowledged payload is freed, its id stays.
- Work is leased under an epoch that only grows; what comes back under another epoch than the request's own is refused.
- Opening takes every lease back, so what a killed gateway left unfinished is dispatched again.
- A write that fails (full disk) changes nothing and raises StorageError.

One process holds a ledger at a time. One thread at a time.
"""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RequestError, StorageError, TransportError
from ..rollout.backend import Completed
from ..rollout.types import RolloutRequest
from .records import FAILURE, decode_request, encode_trajectory, request_digest

STAGED, QUEUED, LEASED, DONE, FAILED = range(5)
_FORMAT = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS clients (client TEXT PRIMARY KEY, key TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS versions (version INTEGER PRIMARY KEY, digest BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS requests (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, client TEXT NOT NULL, batch TEXT NOT NULL, place INTEGER NOT NULL,
    digest BLOB NOT NULL, samples INTEGER NOT NULL, state INTEGER NOT NULL, epoch INTEGER NOT NULL DEFAULT 0,
    recorded INTEGER NOT NULL DEFAULT 0, acked INTEGER NOT NULL DEFAULT 0, payload BLOB);
CREATE INDEX IF NOT EXISTS open_requests ON requests (state, seq) WHERE state < 3;
CREATE TABLE IF NOT EXISTS trajectories (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, request_id TEXT NOT NULL, sample INTEGER NOT NULL, client TEXT NOT NULL,
    acked INTEGER NOT NULL DEFAULT 0, payload BLOB, UNIQUE (request_id, sample));
CREATE INDEX IF NOT EXISTS unacknowledged ON trajectories (client, seq) WHERE acked = 0;
"""


@dataclass(frozen=True, slots=True)
class Pending:
    """A recorded trajectory (or failure, sample -1, its text as payload) that is not acknowledged."""

    seq: int
    request_id: str
    sample: int
    payload: bytes


@dataclass(slots=True)
class Counters:
    """Samples over the ledger's whole life, except `duplicates` and `stale`: outputs dropped since it was created."""

    requested: int = 0
    unique: int = 0
    failed: int = 0
    acknowledged: int = 0
    duplicates: int = 0
    stale: int = 0

    @property
    def missing(self) -> int:
        """Samples asked for that neither arrived nor failed yet."""
        return self.requested - self.unique - self.failed


class Ledger:
    """The durable state of a gateway in one SQLite file.

    Args:
        path: the file; its folder must exist. WAL and synchronous FULL: what a call recorded survives a power cut.
        max_bytes: refuse to grow beyond this (StorageError); None for as much as the disk holds.
    """

    def __init__(self, path: str | Path, *, max_bytes: int | None = None) -> None:
        self.path = Path(path)
        try:
            self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=0.5)
        except sqlite3.Error as error:
            raise self._storage(error) from error
        try:
            with self._guard():
                self._open(max_bytes)
        except BaseException:
            self._db.close()
            raise

    def _open(self, max_bytes: int | None) -> None:
        run = self._db.execute
        # Held from the first read on, released by the kernel when the process dies: no second gateway, no stale lock.
        run("PRAGMA locking_mode=EXCLUSIVE")
        run("PRAGMA journal_mode=WAL")
        run("PRAGMA synchronous=FULL")
        self._db.executescript(_SCHEMA)
        run("INSERT OR IGNORE INTO meta VALUES ('format', ?), ('ledger', ?), ('epoch', 0), ('duplicates', 0), "
            "('stale', 0)", (_FORMAT, uuid.uuid4().hex))
        if self._meta("format") != _FORMAT:
            raise StorageError(f"{self.path} has ledger format {self._meta('format')}, this version writes {_FORMAT}; "
                               "finish it with the version that wrote it, or name a new file")
        if max_bytes is not None:
            run(f"PRAGMA max_page_count={max(1, max_bytes // self._value('PRAGMA page_size'))}")
        run("UPDATE requests SET state=? WHERE state=?", (QUEUED, LEASED))
        self.ledger_id: str = self._meta("ledger")
        self._epoch: int = self._meta("epoch")
        row = run("SELECT COALESCE(SUM(samples), 0), COALESCE(SUM(recorded), 0), COALESCE(SUM(acked), 0), "
                  "COALESCE(SUM(CASE state WHEN ? THEN samples - recorded END), 0) FROM requests WHERE state > ?",
                  (FAILED, STAGED)).fetchone()
        self.counters = Counters(requested=row[0], unique=row[1], acknowledged=row[2], failed=row[3],
                                 duplicates=self._meta("duplicates"), stale=self._meta("stale"))

    def claim(self, client: str, key: str) -> None:
        """Binds a client id to the public key that used it first. Raises TransportError for another key."""
        with self._transaction():
            self._db.execute("INSERT OR IGNORE INTO clients VALUES (?, ?)", (client, key))
            owner = self._value("SELECT key FROM clients WHERE client=?", client)
        if owner != key:
            raise TransportError(f"client id {client!r} belongs to another key; choose another client_id")

    def record_requests(self, client: str, batch: str, part: int, requests: Sequence[tuple[RolloutRequest, bytes]],
                        final: bool) -> tuple[list[int], list[tuple[int, str]]]:
        """Records part of a batch: (request, its record) in order; after the final part the batch is queued.

        Returns, per request, how many of its samples were acknowledged before, and the refused ones as (index, why).
        """
        acked, refused = [], []
        with self._transaction():
            for i, (request, payload) in enumerate(requests):
                digest, place = request_digest(payload), (part << 16) + i
                row = self._db.execute("SELECT client, digest, state, acked FROM requests WHERE id=?",
                                       (request.id,)).fetchone()
                acked.append(0)
                if row is None:
                    self._db.execute(
                        "INSERT INTO requests (id, client, batch, place, digest, samples, state, payload) "
                        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                        (request.id, client, batch, place, digest, request.samples, STAGED, payload))
                elif row[0] != client or row[1] != digest:
                    what = "belongs to another client" if row[0] != client else "was already used with other content"
                    why = RequestError("id", f"{request.id!r} {what}", "give each new request a new id")
                    refused.append((i, str(why)))
                elif row[2] == STAGED:
                    self._db.execute("UPDATE requests SET batch=?, place=? WHERE id=?", (batch, place, request.id))
                else:
                    acked[i] = row[3]
                    if row[2] == FAILED:
                        self._repeat_failure(client, request.id)
            if final:
                which, staged = "FROM requests WHERE client=? AND batch=? AND state=?", (client, batch, STAGED)
                added = self._value(f"SELECT COALESCE(SUM(samples), 0) {which}", *staged)
                self._db.execute("UPDATE requests SET state=? WHERE client=? AND batch=? AND state=?",
                                 (QUEUED, *staged))
        if final:
            self.counters.requested += added
        return acked, refused

    def lease(self, room: int, force: bool = False) -> tuple[int, list[RolloutRequest]] | None:
        """Takes the oldest queued batch under a new epoch.

        None when nothing is queued, or when the batch asks for more than `room` samples and `force` is not set.
        """
        with self._guard():
            head = self._db.execute("SELECT client, batch FROM requests WHERE state=? ORDER BY seq LIMIT 1",
                                    (QUEUED,)).fetchone()
            if head is None:
                return None
            rows = self._db.execute("SELECT id, payload, samples FROM requests WHERE state=? AND client=? AND batch=? "
                                    "ORDER BY place", (QUEUED, *head)).fetchall()
        if not force and sum(r[2] for r in rows) > room:
            return None
        epoch = self._epoch + 1
        with self._transaction():
            self._db.execute("UPDATE meta SET value=? WHERE key='epoch'", (epoch,))
            self._db.executemany("UPDATE requests SET state=?, epoch=? WHERE id=?",
                                 [(LEASED, epoch, r[0]) for r in rows])
        self._epoch = epoch
        return epoch, [decode_request(r[1]) for r in rows]

    def release(self, epoch: int) -> None:
        """Queues again what is unfinished of a lease: its outputs are refused from the next lease on."""
        with self._transaction():
            self._db.execute("UPDATE requests SET state=? WHERE state=? AND epoch=?", (QUEUED, LEASED, epoch))

    def record(self, completed: Sequence[Completed]) -> set[str]:
        """Records outputs of engines, all or none; returns the clients that have something new.

        An output under an old epoch, or for a request that is not leased, is dropped and counted `stale`; one whose key
        is recorded already is dropped and counted in `duplicates`.
        """
        clients: set[str] = set()
        unique = failed = duplicates = stale = 0
        outputs = [_payload(item) for item in completed]
        with self._transaction():
            for item, (place, payload) in zip(completed, outputs, strict=True):
                row = self._db.execute("SELECT client, samples, state, epoch, recorded FROM requests WHERE id=?",
                                       (item.request_id,)).fetchone()
                key = (item.request_id, place)
                client, samples, state, epoch, recorded = row or ("", 0, STAGED, 0, 0)
                if state not in (LEASED, DONE) or epoch != item.epoch or not FAILURE <= place < samples:
                    stale += 1
                    continue
                if self._db.execute("SELECT 1 FROM trajectories WHERE request_id=? AND sample=?", key).fetchone():
                    duplicates += 1
                    continue
                if state == DONE:
                    stale += 1
                    continue
                if place == FAILURE:
                    state, failed = FAILED, failed + samples - recorded
                else:
                    recorded, unique = recorded + 1, unique + 1
                    state = DONE if recorded == samples else LEASED
                self._db.execute("INSERT INTO trajectories (request_id, sample, client, payload) VALUES (?, ?, ?, ?)",
                                 (*key, client, payload))
                self._db.execute(
                    "UPDATE requests SET state=?, recorded=?, payload=CASE ? WHEN ? THEN payload END WHERE id=?",
                    (state, recorded, state, LEASED, item.request_id))
                clients.add(client)
            if duplicates or stale:
                self._db.execute("UPDATE meta SET value=value+? WHERE key='duplicates'", (duplicates,))
                self._db.execute("UPDATE meta SET value=value+? WHERE key='stale'", (stale,))
        self.counters.unique += unique
        self.counters.failed += failed
        self.counters.duplicates += duplicates
        self.counters.stale += stale
        return clients

    def pending(self, client: str, after: int, max_bytes: int = 4 << 20) -> list[Pending]:
        """Unacknowledged outputs of a client's requests with seq > after, oldest first; stops behind `max_bytes`."""
        found: list[Pending] = []
        with self._guard():
            for row in self._db.execute("SELECT seq, request_id, sample, payload FROM trajectories WHERE client=? AND "
                                        "acked=0 AND seq>? ORDER BY seq", (client, after)):
                found.append(Pending(*row))
                max_bytes -= len(found[-1].payload)
                if max_bytes <= 0:
                    break
        return found

    def acknowledge(self, client: str, keys: Sequence[tuple[str, int]]) -> int:
        """Frees the payloads of these (request id, sample); returns how many were not acknowledged before."""
        samples = total = 0
        with self._transaction():
            for request_id, sample in keys:
                # A failure keeps its text: it is the answer to the request for ever.
                new = self._db.execute(
                    "UPDATE trajectories SET acked=1, payload=CASE sample WHEN ? THEN payload END "
                    "WHERE request_id=? AND sample=? AND client=? AND acked=0",
                    (FAILURE, request_id, sample, client)).rowcount
                total += new
                if new and sample != FAILURE:
                    samples += 1
                    self._db.execute("UPDATE requests SET acked=acked+1 WHERE id=?", (request_id,))
        self.counters.acknowledged += samples
        return total

    def committed(self, version: int) -> bytes | None:
        """Digest of the manifest committed as this version, if this ledger saw it."""
        with self._guard():
            row = self._db.execute("SELECT digest FROM versions WHERE version=?", (version,)).fetchone()
        return row[0] if row else None

    def record_version(self, version: int, digest: bytes) -> None:
        """Remembers what was committed as this version."""
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO versions VALUES (?, ?)", (version, digest))

    def close(self) -> None:
        self._db.close()

    def _repeat_failure(self, client: str, request_id: str) -> None:
        """Gives a failure a new place in the client's queue, so that a new submission is answered again."""
        row = self._db.execute("DELETE FROM trajectories WHERE request_id=? AND sample=? RETURNING payload",
                               (request_id, FAILURE)).fetchone()
        self._db.execute("INSERT INTO trajectories (request_id, sample, client, payload) VALUES (?, ?, ?, ?)",
                         (request_id, FAILURE, client, row[0]))

    def _meta(self, key: str) -> Any:
        return self._value("SELECT value FROM meta WHERE key=?", key)

    def _value(self, query: str, *args: object) -> Any:
        return self._db.execute(query, args).fetchone()[0]

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._guard():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._storage(error) from error

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


def _payload(item: Completed) -> tuple[int, bytes]:
    """Sample number and payload of an output; a trajectory that cannot travel is the failure of its request."""
    if item.trajectory is not None:
        try:
            return item.trajectory.sample, encode_trajectory(item.trajectory)
        except TransportError as error:
            return FAILURE, str(error).encode()[:1000]
    return FAILURE, (item.error or "the cluster gave no reason").encode("utf-8", "replace")[:1000]
