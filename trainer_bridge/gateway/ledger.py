"""The ledger: requests and trajectories in SQLite, until the trainer acknowledges them.

Invariants:
- A request is on disk before it is confirmed to the client, and a trajectory before it is sent.
- The same request id with the same content is the same request. With other content, or from another client, it is
  refused.
- (request id, sample) is unique: a second trajectory is dropped, even after the first was acknowledged.
- Work is leased under an epoch, and epochs only grow. An output under another epoch than its request's is refused.
- Opening a ledger ends every lease, so the work that a killed gateway left unfinished is dispatched again.
- The greatest version recorded is the one that serves, or that the service waits for after a restart.
- A write that fails (full disk) changes nothing and raises StorageError.

Retention. An acknowledged payload is freed at once. When all of a request is acknowledged, the request is settled: its
trajectories are deleted, and one row of about 300 bytes with its index stays (id, owner, digest, number of samples), by
which the request is recognised when it is submitted again; a failed request keeps its reason too, which is the answer
then. The `keep` newest settled requests stay, 60 MB for 200,000; older ones are deleted, a few with each
acknowledgement. So the file is bounded by them, by open work and by what clients did not acknowledge. Most of a row is
the request id, so keeping ids and digests alone would save little. A settled request that was deleted is a new request
when it is submitted again, and its work is done again. Counters are kept apart from the rows.

One process holds a ledger at a time. One thread at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

from ...errors import RequestError, TransportError
from ...rollout.backend import Completed
from ...rollout.types import RolloutRequest
from ..wire.records import FAILURE, decode_request, encode_trajectory, request_digest
from .leasing import in_turn
from .ledger_file import COUNTERS, DONE, FAILED, LEASED, OPEN, QUEUED, SETTLED, STAGED, UNACKED, LedgerFile

KEEP, KEEP_VERSIONS = 200_000, 1024
_PURGE = 256
"""Most settled requests deleted with one acknowledgement."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A recorded trajectory that is not acknowledged, or a failure, whose sample is -1 and whose payload is the
    reason."""

    seq: int
    request_id: str
    sample: int
    payload: bytes


@dataclass(slots=True)
class Counters:
    """Samples over the ledger's whole life. `duplicates`, `stale`: outputs that were dropped. `kept`: settled requests
    it holds."""

    requested: int = 0
    unique: int = 0
    failed: int = 0
    acknowledged: int = 0
    duplicates: int = 0
    stale: int = 0
    kept: int = 0

    @property
    def missing(self) -> int:
        """Requested samples that have neither arrived nor failed."""
        return self.requested - self.unique - self.failed


class Ledger:
    """The durable state of a gateway in one SQLite file.

    Args:
        path: the file; its folder must exist.
        max_bytes: refuse to grow beyond this (StorageError); None for as much as the disk holds.
        keep: settled requests that are remembered.
    """

    def __init__(self, path: str | Path, *, max_bytes: int | None = None, keep: int = KEEP) -> None:
        self._file, self._keep = LedgerFile(path, max_bytes), keep
        self.path = self._file.path
        try:
            with self._file.transaction():
                self._file.run(f"UPDATE requests SET state=? WHERE state=? AND {OPEN}", (QUEUED, LEASED))
                # A client that had not finished submitting a batch submits all of it again.
                self._file.run(f"DELETE FROM requests WHERE state=? AND {OPEN}", (STAGED,))
                self.ledger_id: str = self._file.meta("ledger")
                self._epoch: int = self._file.meta("epoch")
                totals = self._file.run("SELECT * FROM counters WHERE id=1").fetchone()
                self.counters = Counters(*totals[1:])
        except BaseException:
            self._file.close()
            raise

    def claim(self, client: str, key: str) -> None:
        """Binds a client id to the public key that used it first. Raises TransportError for another key."""
        with self._file.transaction():
            self._file.run("INSERT OR IGNORE INTO clients VALUES (?, ?)", (client, key))
            owner = self._file.value("SELECT key FROM clients WHERE client=?", client)
        if owner != key:
            raise TransportError(f"client id {client!r} belongs to another key; choose another client_id")

    def record_requests(self, client: str, batch: str, part: int, requests: Sequence[tuple[RolloutRequest, bytes]],
                        final: bool) -> tuple[list[int], list[tuple[int, str]]]:
        """Records part of a batch: (request, its record) in order; after the final part the batch is queued.

        Returns, per request, how many of its samples were acknowledged before, and the refused ones as (index, why).
        """
        acked, refused, run = [], [], self._file.run
        with self._counting() as new:
            for i, (request, payload) in enumerate(requests):
                digest, place = request_digest(payload), (part << 16) + i
                row = run("SELECT client, digest, state, acked FROM requests WHERE id=?", (request.id,)).fetchone()
                acked.append(0)
                if row is None:
                    run("INSERT INTO requests (id, client, batch, place, digest, samples, state, payload) "
                        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                        (request.id, client, batch, place, digest, request.samples, STAGED, payload))
                elif row[0] != client or row[1] != digest:
                    what = "belongs to another client" if row[0] != client else "was already used with other content"
                    why = RequestError("id", f"{request.id!r} {what}", "give each new request a new id")
                    refused.append((i, str(why)))
                elif row[2] == STAGED:
                    run("UPDATE requests SET batch=?, place=? WHERE id=?", (batch, place, request.id))
                else:
                    acked[i] = row[3]
                    if row[2] == FAILED:
                        self._repeat_failure(client, request.id, new)
            if final:
                staged = f"state=? AND client=? AND batch=? AND {OPEN}"
                new.requested += self._file.value(
                    f"SELECT COALESCE(SUM(samples), 0) FROM requests WHERE {staged}", STAGED, client, batch)
                run(f"UPDATE requests SET state=? WHERE {staged}", (QUEUED, STAGED, client, batch))
        return acked, refused

    def lease(self, room: int, force: bool = False) -> tuple[int, list[RolloutRequest]] | None:
        """Leases the oldest queued batch under a new epoch.

        None when nothing is queued, or when the batch asks for more than `room` samples and `force` is not set.
        """
        run = self._file.run
        with self._file.guard():
            head = run(f"SELECT client, batch FROM requests WHERE state=? AND {OPEN} ORDER BY seq LIMIT 1",
                       (QUEUED,)).fetchone()
            if head is None:
                return None
            rows = run("SELECT id, payload, samples FROM requests WHERE state=? AND client=? AND batch=? AND "
                       f"{OPEN} ORDER BY place", (QUEUED, *head)).fetchall()
        if not force and sum(r[2] for r in rows) > room:
            return None
        epoch = self._epoch + 1
        with self._file.transaction():
            run("UPDATE meta SET value=? WHERE key='epoch'", (epoch,))
            for row in rows:
                run("UPDATE requests SET state=?, epoch=? WHERE id=?", (LEASED, epoch, row[0]))
        self._epoch = epoch
        return epoch, [decode_request(r[1]) for r in rows]

    def lease_in_turn(self, most: int, in_flight: Mapping[str, int]) -> tuple[int, list[RolloutRequest], list[str]] | None:
        """Leases queued requests of clients in turn (`leasing.in_turn`) under a new epoch, and says whose each is. None when
        nothing is queued or there is no room.

        Args: most: samples that may be in flight. in_flight: those that are, by client.
        """
        with self._file.guard():
            found = in_turn(self._file, most, in_flight, "samples, id, payload")
        if not found:
            return None
        epoch = self._epoch + 1
        with self._file.transaction():
            self._file.run("UPDATE meta SET value=? WHERE key='epoch'", (epoch,))
            for _, row in found:
                self._file.run("UPDATE requests SET state=?, epoch=? WHERE id=?", (LEASED, epoch, row[1]))
        self._epoch = epoch
        return epoch, [decode_request(row[2]) for _, row in found], [client for client, _ in found]

    def release(self, epoch: int) -> None:
        """Queues the unfinished work of a lease again. From the next lease on, outputs of this one are refused."""
        with self._file.transaction():
            self._file.run(f"UPDATE requests SET state=? WHERE state=? AND epoch=? AND {OPEN}", (QUEUED, LEASED, epoch))

    def record(self, completed: Sequence[Completed]) -> set[str]:
        """Records outputs of engines, all or none; returns the clients that have something new.

        An output under an old epoch, or for a request that is not leased, is dropped and counted `stale`; one whose key
        is recorded already is dropped and counted in `duplicates`.
        """
        clients: set[str] = set()
        outputs, run = [_payload(item) for item in completed], self._file.run
        with self._counting() as new:
            for item, (place, payload) in zip(completed, outputs, strict=True):
                row = run("SELECT client, samples, state, epoch, recorded, settled FROM requests WHERE id=?",
                          (item.request_id,)).fetchone()
                key = (item.request_id, place)
                client, samples, state, epoch, recorded, settled = row or ("", 0, STAGED, 0, 0, 0)
                if state not in (LEASED, DONE) or epoch != item.epoch or not FAILURE <= place < samples:
                    new.stale += 1
                    continue
                if settled or run("SELECT 1 FROM trajectories WHERE request_id=? AND sample=?", key).fetchone():
                    new.duplicates += 1
                    continue
                if state == DONE:
                    new.stale += 1
                    continue
                clients.add(client)
                if place == FAILURE:
                    new.failed += samples - recorded
                    self._fail(item.request_id, client, payload)
                    continue
                recorded, new.unique = recorded + 1, new.unique + 1
                run("INSERT INTO trajectories (request_id, sample, client, payload) VALUES (?, ?, ?, ?)",
                    (*key, client, payload))
                if recorded < samples:
                    run("UPDATE requests SET recorded=? WHERE id=?", (recorded, item.request_id))
                else:
                    run("UPDATE requests SET state=?, recorded=?, payload=NULL WHERE id=?", (DONE, recorded, item.request_id))
        return clients

    def cancel(self, client: str, request_ids: Sequence[str], why: str) -> list[str]:
        """Fails the unfinished ones of these requests of a client; returns the ids of those that were leased."""
        leased, reason = list[str](), why.encode("utf-8", "replace")[:1000]
        with self._counting() as new:
            for request_id in request_ids:
                row = self._file.run(f"SELECT state, samples, recorded FROM requests WHERE id=? AND client=? AND {OPEN}",
                                     (request_id, client)).fetchone()
                if row is None:
                    continue
                state, samples, recorded = row
                if state == STAGED:
                    new.requested += samples
                elif state == LEASED:
                    leased.append(request_id)
                new.failed += samples - recorded
                self._fail(request_id, client, reason)
        return leased

    def pending(self, client: str, after: int, max_bytes: int = 4 << 20) -> list[Pending]:
        """Unacknowledged outputs of a client's requests with seq > after, oldest first; stops behind `max_bytes`."""
        found: list[Pending] = []
        with self._file.guard():
            for row in self._file.run("SELECT seq, request_id, sample, payload FROM trajectories WHERE client=? AND "
                                      f"{UNACKED} AND seq>? ORDER BY seq", (client, after)):
                found.append(Pending(*row))
                max_bytes -= len(found[-1].payload)
                if max_bytes <= 0:
                    break
        return found

    def acknowledge(self, client: str, keys: Sequence[tuple[str, int]]) -> int:
        """Frees the payloads of these (request id, sample); returns how many were not acknowledged before."""
        total, run, touched = 0, self._file.run, set()
        with self._counting() as new:
            for request_id, sample in keys:
                fresh = run(f"UPDATE trajectories SET acked=1, payload=NULL WHERE request_id=? AND sample=? AND client=? "
                            f"AND {UNACKED}", (request_id, sample, client)).rowcount
                if fresh:
                    total += 1
                    touched.add(request_id)
                    if sample != FAILURE:
                        new.acknowledged += 1
                        run("UPDATE requests SET acked=acked+1 WHERE id=?", (request_id,))
            for request_id in touched:
                self._settle(request_id, new)
            self._purge(new)
        self._file.give_back()
        return total

    def committed(self, version: int) -> bytes | None:
        """Digest of the manifest committed as this version, if this ledger remembers it."""
        with self._file.guard():
            row = self._file.run("SELECT digest FROM versions WHERE version=?", (version,)).fetchone()
        return row[0] if row else None

    def last_version(self) -> tuple[int, bytes] | None:
        """The version committed last and its digest; None before the first push."""
        with self._file.guard():
            row: tuple[int, bytes] | None = self._file.run(
                "SELECT version, digest FROM versions WHERE version=(SELECT MAX(version) FROM versions)").fetchone()
        return row

    def record_version(self, version: int, digest: bytes) -> None:
        """Records that this version serves."""
        with self._file.transaction():
            self._file.run("INSERT OR REPLACE INTO versions VALUES (?, ?)", (version, digest))
            self._file.run("DELETE FROM versions WHERE version<=?", (version - KEEP_VERSIONS,))

    def size(self) -> tuple[int, int]:
        """Bytes of the file, and those of them that are free for new rows."""
        return self._file.size()

    def close(self) -> None:
        self._file.close()

    def _fail(self, request_id: str, client: str, reason: bytes) -> None:
        """The request fails. It keeps the reason, which is the answer to every later submission."""
        self._file.run("INSERT INTO trajectories (request_id, sample, client, payload) VALUES (?, ?, ?, ?)",
                       (request_id, FAILURE, client, reason))
        self._file.run("UPDATE requests SET state=?, payload=? WHERE id=?", (FAILED, reason, request_id))

    def _settle(self, request_id: str, new: Counters) -> None:
        """Deletes the trajectories of a request of which everything is acknowledged."""
        run = self._file.run
        if run(f"SELECT 1 FROM trajectories WHERE request_id=? AND {UNACKED}", (request_id,)).fetchone():
            return
        if run("UPDATE requests SET settled=1 WHERE id=? AND state>=? AND settled=0", (request_id, DONE)).rowcount:
            run("DELETE FROM trajectories WHERE request_id=?", (request_id,))
            new.kept += 1

    def _purge(self, new: Counters) -> None:
        """Deletes the oldest settled requests beyond `keep`, a few at a time."""
        if (over := min(self.counters.kept + new.kept - self._keep, _PURGE)) > 0:
            new.kept -= self._file.run(f"DELETE FROM requests WHERE seq IN (SELECT seq FROM requests WHERE {SETTLED} "
                                       "ORDER BY seq LIMIT ?)", (over,)).rowcount

    def _repeat_failure(self, client: str, request_id: str, new: Counters) -> None:
        """Gives a failure a new place in the client's queue, so that a new submission is answered again."""
        run = self._file.run
        run("DELETE FROM trajectories WHERE request_id=? AND sample=?", (request_id, FAILURE))
        run("INSERT INTO trajectories (request_id, sample, client, payload) "
            "SELECT id, ?, ?, payload FROM requests WHERE id=?", (FAILURE, client, request_id))
        new.kept -= run("UPDATE requests SET settled=0 WHERE id=? AND settled=1", (request_id,)).rowcount

    @contextmanager
    def _counting(self) -> Iterator[Counters]:
        """A transaction. What the block adds to the yielded counters is added to the ledger's."""
        new = Counters()
        with self._file.transaction():
            yield new
            if any(astuple(new)):
                changes = ", ".join(f"[{name}]=[{name}]+?" for name in COUNTERS)
                self._file.run(f"UPDATE counters SET {changes} WHERE id=1", astuple(new))
        for name in COUNTERS:
            setattr(self.counters, name, getattr(self.counters, name) + getattr(new, name))


def _payload(item: Completed) -> tuple[int, bytes]:
    """Sample number and payload of an output; a trajectory that cannot travel is the failure of its request."""
    if item.trajectory is not None:
        try:
            return item.trajectory.sample, encode_trajectory(item.trajectory)
        except TransportError as error:
            return FAILURE, str(error).encode()[:1000]
    return FAILURE, (item.error or "the cluster gave no reason").encode("utf-8", "replace")[:1000]
