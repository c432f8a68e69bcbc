"""What a ledger keeps of requests that ended, and for how long.

An acknowledged payload is freed at once. When all of a request is acknowledged, the request is settled: its
trajectories are deleted, and one row of about 300 bytes with its index stays (id, owner, digest, number of samples), by
which the request is recognised when it is submitted again; a failed request keeps its reason too, which is the answer
then. The `keep` newest settled requests stay, 60 MB for 200,000; older ones are deleted, a few with each
acknowledgement. So the file is bounded by them, by open work and by what clients did not acknowledge. Most of a row is
the request id, so keeping ids and digests alone would save little. A settled request that was deleted is a new request
when it is submitted again, and its work is done again. Counters are kept apart from the rows.

The functions run inside a transaction and add to its change of the counters.
"""

from __future__ import annotations

from ..wire.records import FAILURE
from .ledger_counters import Change
from .ledger_file import DONE, FAILED, SETTLED, UNACKED, LedgerFile

KEEP, KEEP_VERSIONS = 200_000, 1024
_PURGE = 256
"""Most settled requests deleted with one acknowledgement."""


def fail(file: LedgerFile, request_id: str, client: str, missing: int, reason: bytes, new: Change) -> None:
    """An open request fails, of which `missing` samples are to come. It keeps the reason, which is the answer to every
    later submission."""
    file.run("INSERT OR REPLACE INTO trajectories (request_id, sample, client, payload) VALUES (?, ?, ?, ?)",
             (request_id, FAILURE, client, reason))
    file.run("UPDATE requests SET state=?, payload=? WHERE id=?", (FAILED, reason, request_id))
    new.failed += missing
    new.unfinished[client] -= missing


def repeat_failure(file: LedgerFile, client: str, request_id: str, new: Change) -> None:
    """Gives a failure a new place in the client's queue, so that a new submission is answered again."""
    file.run("DELETE FROM trajectories WHERE request_id=? AND sample=?", (request_id, FAILURE))
    file.run("INSERT INTO trajectories (request_id, sample, client, payload) "
             "SELECT id, ?, ?, payload FROM requests WHERE id=?", (FAILURE, client, request_id))
    new.kept -= file.run("UPDATE requests SET settled=0 WHERE id=? AND settled=1", (request_id,)).rowcount


def settle(file: LedgerFile, request_id: str, new: Change) -> None:
    """Deletes the trajectories of a request of which everything is acknowledged."""
    if file.run(f"SELECT 1 FROM trajectories WHERE request_id=? AND {UNACKED}", (request_id,)).fetchone():
        return
    if file.run("UPDATE requests SET settled=1 WHERE id=? AND state>=? AND settled=0", (request_id, DONE)).rowcount:
        file.run("DELETE FROM trajectories WHERE request_id=?", (request_id,))
        new.kept += 1


def purge(file: LedgerFile, over: int, new: Change) -> None:
    """Deletes the oldest settled requests, which are `over` too many, a few at a time."""
    if (few := min(over, _PURGE)) > 0:
        new.kept -= file.run(f"DELETE FROM requests WHERE seq IN (SELECT seq FROM requests WHERE {SETTLED} "
                             "ORDER BY seq LIMIT ?)", (few,)).rowcount
