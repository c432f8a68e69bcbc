"""The ledger: requests and trajectories in SQLite, until the trainer acknowledges them.

Invariants:
- What `record_parts`, `record` and `acknowledge` have recorded is on disk after the next `sync`. The caller calls it before it
  confirms a request or an acknowledgement, and before it sends a trajectory. A lease need not be on disk: opening ends it.
- The same request id with the same content is the same request. With other content, or from another client, it is
  refused.
- (request id, sample) is unique: a second trajectory is dropped, even after the first was acknowledged.
- Work is leased under an epoch, and epochs only grow. An output under another epoch than its request's is refused.
- Opening a ledger ends every lease, so the work that a killed gateway left unfinished is dispatched again.
- The greatest version recorded is the one that serves, or that the service waits for after a restart.
- Work of a client that is gone is PAUSED: nobody leases it until `resume`.
- A damaged row fails its own request, with a reason that names the row (`damage`).
- A client's unfinished samples, and the samples of one request, are bounded; more are refused by name.
- A write that fails (full disk) changes nothing and raises StorageError.

What is kept of answered requests: `retention`. What is counted: `ledger_counters`. One process holds a ledger at a time, and one
thread uses it at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import TransportError
from ...rollout.backend import Completed
from ...rollout.types import RolloutRequest, Trajectory
from ..wire.limits import MAX_CLIENT_SAMPLES, MAX_REQUEST_SAMPLES
from ..wire.records import FAILURE
from . import aborting
from .aborting import Aborted
from .batch_parts import Part, Receipt, forget_staged, record_part
from .damage import Pending, fail_damaged, read_pending, read_requests
from .leasing import in_turn
from .ledger_counters import Change, Counters, Totals
from .ledger_file import DONE, LEASED, OPEN, PAUSED, QUEUED, STAGED, UNACKED, LedgerFile
from .outputs import payload_of
from .retention import KEEP, KEEP_VERSIONS, fail, purge, settle


class Ledger:
    """The durable state of a gateway in one SQLite file.

    Args:
        path: the file; its folder must exist.
        max_bytes: refuse to grow beyond this (StorageError); None for as much as the disk holds.
        keep: settled requests that are remembered.
        max_request_samples, max_client_samples: most samples of one request, and unfinished ones of one client.
    """

    def __init__(self, path: str | Path, *, max_bytes: int | None = None, keep: int = KEEP,
                 max_request_samples: int = MAX_REQUEST_SAMPLES, max_client_samples: int = MAX_CLIENT_SAMPLES) -> None:
        self._file, self._keep = LedgerFile(path, max_bytes), keep
        self._most = (max_request_samples, max_client_samples)
        self.path = self._file.path
        self._news: set[str] = set()
        try:
            with self._file.transaction():
                self._file.run(f"UPDATE requests SET state=? WHERE state=? AND {OPEN}", (QUEUED, LEASED))
                # A client that had not finished submitting a batch submits all of it again.
                self._file.run(f"DELETE FROM requests WHERE state=? AND {OPEN}", (STAGED,))
                self.ledger_id: str = self._file.meta("ledger")
                self._epoch: int = self._file.meta("epoch")
                self._inherited: int = self._file.value("SELECT COALESCE(MAX(seq), 0) FROM trajectories")
                self._totals = Totals(self._file)
                self._paused = {row[0] for row in self._file.run(f"SELECT client FROM requests WHERE state=? AND {OPEN}",
                                                                 (PAUSED,))}
        except BaseException:
            self._file.close()
            raise

    @property
    def counters(self) -> Counters:
        """Samples over the ledger's whole life."""
        return self._totals.counters

    def check(self) -> None:
        """Raises StorageError when the file was deleted or replaced."""
        self._file.check()

    def sync(self) -> None:
        """All that was recorded is on disk when this returns. Raises StorageError, as each `sync` and `check` from then on."""
        self._file.sync()

    def take_news(self) -> set[str]:
        """The clients of which requests failed here since the last call, because their rows are damaged."""
        news, self._news = self._news, set()
        return news

    def claim(self, client: str, key: str) -> None:
        """Binds a client id to the public key that used it first. Raises TransportError for another key."""
        with self._file.transaction():
            self._file.run("INSERT OR IGNORE INTO clients VALUES (?, ?)", (client, key))
            owner = self._file.value("SELECT key FROM clients WHERE client=?", client)
        if owner != key:
            raise TransportError(f"client id {client!r} belongs to another key; choose another client_id")

    def release_client(self, client: str) -> list[str]:
        """Frees a client id for another key; returns the ids of the client's unfinished requests."""
        with self._file.transaction():
            self._file.run("DELETE FROM clients WHERE client=?", (client,))
            return [row[0] for row in self._file.run(f"SELECT id FROM requests WHERE client=? AND {OPEN}", (client,))]

    def record_parts(self, parts: Sequence[Part]) -> list[Receipt]:
        """Records parts of batches in one transaction, all or none; returns what to tell the client of each. A batch is queued
        after its final part."""
        with self._totals.changing(durable=False) as new:
            unfinished = self._totals.unfinished
            return [record_part(self._file, part, self._most, unfinished[part.client], new) for part in parts]

    def forget_batches(self, batches: Collection[tuple[str, str]]) -> None:
        """What came of these (client, batch), which were refused before they were complete, is as if it had not come."""
        with self._totals.changing() as new:
            for client, batch in batches:
                forget_staged(self._file, client, batch, new)

    def lease(self, room: int, force: bool = False) -> tuple[int, list[RolloutRequest]] | None:
        """Leases the oldest queued batch under a new epoch. None when nothing is queued, or when the batch asks for more than
        `room` samples and `force` is not set."""
        run = self._file.run
        with self._file.guard():
            head = run(f"SELECT client, batch FROM requests WHERE state=? AND {OPEN} ORDER BY seq LIMIT 1",
                       (QUEUED,)).fetchone()
            if head is None:
                return None
            queued = f"FROM requests WHERE state=? AND client=? AND batch=? AND {OPEN}"
            if not force and self._file.value(f"SELECT SUM(samples) {queued}", QUEUED, *head) > room:
                return None
            rows = run(f"SELECT id, samples, digest, payload {queued} ORDER BY place", (QUEUED, *head)).fetchall()
        return self._leased([(head[0], row) for row in rows])[:2]

    def lease_in_turn(self, most: int, in_flight: Mapping[str, int]) -> tuple[int, list[RolloutRequest], list[str]] | None:
        """Leases queued requests of clients in turn (`leasing.in_turn`) under a new epoch, and says whose each is. None when
        nothing is queued or there is no room.

        Args: most: samples that may be in flight. in_flight: those that are, by client.
        """
        with self._file.guard():
            found = in_turn(self._file, most, in_flight)
        return self._leased(found) if found else None

    def _leased(self, found: Sequence[tuple[str, tuple[Any, ...]]]) -> tuple[int, list[RolloutRequest], list[str]]:
        """Leases rows (id, samples, digest, payload) of clients under a new epoch. Those that are damaged fail."""
        whole, damaged = read_requests(found)
        with self._totals.changing(durable=False) as new:
            epoch = self._take([row[0] for _, row in found], damaged, new)
        self._epoch = epoch
        self._news.update(client for client, _, _ in damaged)
        return epoch, [request for _, request in whole], [client for client, _ in whole]

    def _take(self, request_ids: Sequence[str], damaged: Sequence[tuple[str, str, str]], new: Change) -> int:
        """Inside a transaction: leases these requests and fails those (client, id, why) that are damaged; returns the epoch."""
        epoch = self._epoch + 1
        self._file.run("UPDATE meta SET value=? WHERE key='epoch'", (epoch,))
        for request_id in request_ids:
            self._file.run("UPDATE requests SET state=?, epoch=? WHERE id=?", (LEASED, epoch, request_id))
        for client, request_id, why in damaged:
            fail_damaged(self._file, request_id, client, why, new)
        return epoch

    def release(self, epoch: int) -> None:
        """Queues the unfinished work of a lease again. From the next lease on, outputs of this one are refused."""
        with self._file.transaction():
            self._file.run(f"UPDATE requests SET state=? WHERE state=? AND epoch=? AND {OPEN}", (QUEUED, LEASED, epoch))

    def record(self, completed: Sequence[Completed]) -> set[str]:
        """Records outputs of engines, all or none; returns the clients that have something new. An output under an old epoch, or
        for a request that is not leased, is dropped and counted `stale`; one whose key is recorded already in `duplicates`."""
        outputs = [(item, *payload_of(item)) for item in completed]
        with self._totals.changing(durable=False) as new:
            return self._record(outputs, new)

    def _record(self, outputs: Sequence[tuple[Completed, int, bytes]], new: Change) -> set[str]:
        """Inside a transaction: `record`, for outputs with the sample number and payload of each."""
        clients, run = set[str](), self._file.run
        for item, place, payload in outputs:
            columns, key = "client, samples, state, epoch, recorded, settled", (item.request_id, place)
            row = run(f"SELECT {columns} FROM requests WHERE id=?", (item.request_id,)).fetchone()
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
                fail(self._file, item.request_id, client, samples - recorded, payload, new)
                continue
            recorded, new.unique = recorded + 1, new.unique + 1
            new.unfinished[client] -= 1
            run("INSERT INTO trajectories (request_id, sample, client, payload) VALUES (?, ?, ?, ?)", (*key, client, payload))
            if recorded < samples:
                run("UPDATE requests SET recorded=? WHERE id=?", (recorded, item.request_id))
            else:
                run("UPDATE requests SET state=?, recorded=?, payload=NULL WHERE id=?", (DONE, recorded, item.request_id))
        return clients

    def cancel(self, client: str, request_ids: Sequence[str], why: str) -> list[str]:
        """Fails the unfinished ones of these requests of a client; returns the ids of those that were leased."""
        leased, reason = list[str](), why.encode("utf-8", "replace")[:1000]
        with self._totals.changing() as new:
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
                fail(self._file, request_id, client, samples - recorded, reason, new)
        return leased

    def abort_queued(self, aborted: Aborted) -> set[str]:
        """Answers some of these requests, which are queued, with samples that have no token, in one transaction; returns the
        clients that have something new, none where nothing was queued. To be called until `any_open` says no."""
        with self._file.guard():
            found = aborting.queued(self._file, aborted)
        if not found:
            return set()
        (whole, damaged), epoch = read_requests(found), self._epoch + 1
        ended = [Completed(epoch, request.id, Trajectory.aborted(request, number))
                 for _, request in whole for number in range(request.samples)]
        with self._totals.changing() as new:
            self._take([row[0] for _, row in found], damaged, new)
            clients = self._record([(item, *payload_of(item)) for item in ended], new)
        self._epoch = epoch
        return clients | {client for client, _, _ in damaged}

    def any_open(self, aborted: Aborted) -> bool:
        """Whether one of these requests is queued or leased."""
        with self._file.guard():
            return aborting.any_open(self._file, aborted)

    def any_leased(self) -> bool:
        """Whether any request is leased."""
        with self._file.guard():
            return aborting.any_leased(self._file)

    def newest(self) -> int:
        """The row of the newest request."""
        with self._file.guard():
            return aborting.newest(self._file)

    @property
    def outstanding(self) -> int:
        """Unfinished samples of the clients that are not paused."""
        return sum(samples for client, samples in self._totals.unfinished.items() if client not in self._paused)

    def clients_at_work(self) -> set[str]:
        """The clients with unfinished samples that are not paused, or with an unfinished submission."""
        return set(self._totals.unfinished) - self._paused

    def pause(self, client: str) -> list[str]:
        """Nobody leases a client's unfinished work from now on; returns the ids of requests that were leased. A batch that
        the client had not finished submitting is forgotten."""
        run = self._file.run
        with self._totals.changing() as new:
            gone = f"state=? AND client=? AND {OPEN}"
            forget_staged(self._file, client, None, new)
            leased = [row[0] for row in run(f"SELECT id FROM requests WHERE {gone}", (LEASED, client))]
            for state in (QUEUED, LEASED):
                run(f"UPDATE requests SET state=? WHERE {gone}", (PAUSED, state, client))
        self._paused.add(client)
        return leased

    def resume(self, client: str) -> None:
        """The client is back: its paused work is queued again. It submits again what it had not finished submitting."""
        with self._totals.changing() as new:
            forget_staged(self._file, client, None, new)
            self._file.run(f"UPDATE requests SET state=? WHERE state=? AND client=? AND {OPEN}", (QUEUED, PAUSED, client))
        self._paused.discard(client)

    def pending(self, client: str, after: int, max_bytes: int = 4 << 20) -> list[Pending]:
        """Unacknowledged outputs of a client's requests with seq > after, oldest first; stops behind `max_bytes`.

        A trajectory that was recorded before this ledger was opened is decoded; one that is damaged fails its request,
        and the failure takes its place.
        """
        with self._file.guard():
            found, damaged = read_pending(self._file, client, after, max_bytes, self._inherited)
        if not damaged:
            return found
        with self._totals.changing() as new:
            for request_id, why in damaged.items():
                fail_damaged(self._file, request_id, client, why, new)
        return self.pending(client, after, max_bytes)

    def acknowledge(self, client: str, keys: Sequence[tuple[str, int]]) -> int:
        """Frees the payloads of these (request id, sample); returns how many were not acknowledged before."""
        total, run, touched = 0, self._file.run, set()
        with self._totals.changing(durable=False) as new:
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
                settle(self._file, request_id, new)
            purge(self._file, self.counters.kept + new.kept - self._keep, new)
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
