"""The ledger: nothing recorded is lost, nothing is recorded twice, a full disk changes nothing."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bridge_parts import assert_same, make_trajectory, request

from blockroll.errors import StorageError, TransportError
from blockroll.rollout.backend import Completed
from blockroll.rollout.types import RolloutRequest
from blockroll.trainer_bridge.ledger import Ledger
from blockroll.trainer_bridge.records import FAILURE, decode_trajectory, encode_request

ROOM = 10**6


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(tmp_path / "ledger.sqlite")
    yield made
    made.close()


def record(ledger: Ledger, *asked: RolloutRequest, client: str = "t", batch: str = "b", part: int = 0,
           final: bool = True) -> tuple[list[int], list[tuple[int, str]]]:
    return ledger.record_requests(client, batch, part, [(r, encode_request(r)) for r in asked], final)


def done(epoch: int, asked: RolloutRequest, sample: int, version: int = 0) -> Completed:
    return Completed(epoch, asked.id, make_trajectory(asked, sample, version))


def test_life_of_a_request(ledger: Ledger) -> None:
    a, b = request("a", 2), request("b")
    assert record(ledger, a, b) == ([0, 0], [])
    leased = ledger.lease(ROOM)
    assert leased == (1, [a, b])
    assert ledger.lease(ROOM) is None
    assert ledger.record([done(1, a, 1), done(1, b, 0)]) == {"t"}
    pending = ledger.pending("t", 0)
    assert [(p.request_id, p.sample) for p in pending] == [("a", 1), ("b", 0)]
    assert_same(decode_trajectory(pending[0].payload), make_trajectory(a, 1))
    assert ledger.pending("t", pending[0].seq) == pending[1:]
    assert ledger.acknowledge("t", [("a", 1), ("a", 0), ("zzz", 0)]) == 1
    assert ledger.acknowledge("other", [("b", 0)]) == 0
    assert [p.request_id for p in ledger.pending("t", 0)] == ["b"]
    assert (ledger.counters.requested, ledger.counters.unique, ledger.counters.missing) == (3, 2, 1)
    ledger.record([done(1, a, 0)])
    assert ledger.counters.missing == 0


def test_a_batch_is_leased_whole_in_order_and_only_when_it_is_complete(ledger: Ledger) -> None:
    asked = [request(f"r{i}", 2) for i in (3, 1, 2)]
    record(ledger, *asked[:2], final=False)
    assert ledger.lease(ROOM) is None
    record(ledger, asked[2], part=1)
    record(ledger, request("later"), batch="c")
    assert ledger.lease(5) is None
    assert ledger.lease(5, force=True) == (1, asked)
    assert ledger.lease(ROOM) == (2, [request("later")])


def test_same_id_same_content_is_the_same_request_and_other_content_is_refused_by_name(ledger: Ledger) -> None:
    record(ledger, request("a"))
    acked, refused = record(ledger, request("a"), request("a", prompt=[9]), request("new"), batch="c")
    assert acked == [0, 0, 0]
    assert [i for i, _ in refused] == [1]
    assert "'a'" in refused[0][1]
    assert record(ledger, request("a"), client="other")[1][0][0] == 0
    assert [r.id for r in ledger.lease(ROOM)[1]] == ["a"]  # type: ignore[index]
    assert [r.id for r in ledger.lease(ROOM)[1]] == ["new"]  # type: ignore[index]
    assert ledger.counters.requested == 2


def test_requests_of_an_abandoned_batch_join_the_next(ledger: Ledger) -> None:
    record(ledger, request("a"), request("b"), final=False)
    record(ledger, request("b"), request("c"), batch="second")
    assert ledger.lease(ROOM) == (1, [request("b"), request("c")])


def test_duplicates_and_old_epochs_are_dropped_for_ever(ledger: Ledger) -> None:
    a = request("a", 2)
    record(ledger, a)
    ledger.lease(ROOM)
    ledger.record([done(1, a, 0), done(1, a, 0)])
    ledger.release(1)
    assert ledger.lease(ROOM) == (2, [a])
    assert ledger.record([done(1, a, 1)]) == set()
    assert ledger.record([done(2, a, 0, version=5), done(2, a, 1)]) == {"t"}
    assert ledger.acknowledge("t", [("a", 0), ("a", 1)]) == 2
    assert ledger.record([done(2, a, 0), done(2, a, 1), done(2, a, 7), done(2, request("ghost"), 0)]) == set()
    assert ledger.pending("t", 0) == []
    c = ledger.counters
    assert (c.unique, c.duplicates, c.stale, c.acknowledged) == (2, 4, 3, 2)


def test_a_failed_request_is_answered_once_per_submission(ledger: Ledger) -> None:
    a = request("a", 3)
    record(ledger, a)
    ledger.lease(ROOM)
    assert ledger.record([done(1, a, 0), Completed(1, "a", error="too long"), done(1, a, 1)]) == {"t"}
    assert [(p.sample, p.payload) for p in ledger.pending("t", 0)][1] == (FAILURE, b"too long")
    ledger.acknowledge("t", [("a", 0), ("a", FAILURE)])
    assert ledger.pending("t", 0) == []
    assert (ledger.counters.failed, ledger.counters.missing) == (2, 0)
    record(ledger, a, batch="again")
    assert [(p.sample, p.payload) for p in ledger.pending("t", 0)] == [(FAILURE, b"too long")]


def test_a_write_that_breaks_off_leaves_nothing(ledger: Ledger) -> None:
    pairs: Any = [(request("a"), encode_request(request("a"))), (None, b"")]
    with pytest.raises(AttributeError):
        ledger.record_requests("t", "b", 0, pairs, True)
    assert ledger.lease(ROOM) is None
    assert ledger.counters.requested == 0
    assert record(ledger, request("a", prompt=[9])) == ([0], [])


def test_malformed_output_of_an_engine_fails_its_request_alone(ledger: Ledger) -> None:
    a, b = request("a"), request("b")
    record(ledger, a, b)
    ledger.lease(ROOM)
    bad = make_trajectory(a, 0)
    bad.logprobs = bad.logprobs[:0]
    ledger.record([Completed(1, "a", bad), done(1, b, 0)])
    assert [(p.request_id, p.sample) for p in ledger.pending("t", 0)] == [("a", FAILURE), ("b", 0)]


def test_reopening_resumes(tmp_path: Path) -> None:
    path, a, b = tmp_path / "l.sqlite", request("a", 2), request("b")
    first = Ledger(path)
    record(first, a, b)
    first.lease(ROOM)
    first.record([done(1, a, 0), done(1, b, 0), done(1, b, 0)])
    first.acknowledge("t", [("b", 0)])
    name, counters = first.ledger_id, first.counters
    first.close()
    second = Ledger(path)
    assert (second.ledger_id, second.counters) == (name, counters)
    assert [(p.request_id, p.sample) for p in second.pending("t", 0)] == [("a", 0)]
    assert second.lease(ROOM) == (2, [a])
    assert second.record([done(1, a, 1)]) == set()
    assert record(second, b, batch="again") == ([1], [])
    second.close()


def finish(ledger: Ledger, *names: str, samples: int = 1) -> list[tuple[str, int]]:
    """Requests asked for, served and not acknowledged; their keys."""
    asked = [request(name, samples) for name in names]
    record(ledger, *asked, batch=names[0])
    epoch = ledger.lease(ROOM)[0]  # type: ignore[index]
    ledger.record([done(epoch, r, i) for r in asked for i in range(samples)])
    return [(name, i) for name in names for i in range(samples)]


def test_every_statement_finds_its_rows_by_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of the statements as they are prepared, values unknown: what a partial index may answer is decided there."""
    said: dict[str, int] = {}

    class Spy(sqlite3.Connection):
        def execute(self, sql: str, values: Any = (), /) -> sqlite3.Cursor:
            said[sql] = len(values)
            return super().execute(sql, values)

        def executemany(self, sql: str, rows: Any, /) -> sqlite3.Cursor:
            said[sql] = sql.count("?")
            return super().executemany(sql, rows)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **k, factory=Spy))
    path = tmp_path / "l.sqlite"
    Ledger(path).close()
    ledger = Ledger(path, **({"keep": 1} if "keep" in Ledger.__init__.__kwdefaults__ else {}))
    ledger.claim("t", "key")
    keys = finish(ledger, "a", "b", samples=2)
    record(ledger, request("a", 2), request("a", 2, seed=8), batch="again")
    record(ledger, request("part"), batch="p", final=False)
    record(ledger, request("part"), request("bad"), batch="q")
    epoch, _ = ledger.lease(ROOM)  # type: ignore[misc]
    ledger.release(epoch)
    epoch, _ = ledger.lease(ROOM)  # type: ignore[misc]
    ledger.record([done(epoch, request("part"), 0), Completed(epoch, "bad", error="no")])
    for pending in ledger.pending("t", 0):
        ledger.acknowledge("t", [(pending.request_id, pending.sample)])
    record(ledger, request("bad"), batch="r")
    ledger.acknowledge("t", keys)
    ledger.record_version(1, b"digest")
    assert ledger.committed(1) == b"digest"
    assert ledger.counters.missing == 0
    ledger.close()
    db, plans = connect(path), {}
    for sql, count in said.items():
        if sql.split()[0] in ("SELECT", "UPDATE", "DELETE") and "sqlite_schema" not in sql:
            rows = db.execute(f"EXPLAIN QUERY PLAN {sql}", (None,) * count).fetchall()
            plans[sql] = [row[3] for row in rows]
    db.close()
    assert len(plans) > 15
    scans = {sql: plan for sql, plan in plans.items() if any(p.startswith("SCAN") for p in plan)}
    assert not scans


def test_settled_requests_are_remembered_up_to_a_number_and_counted_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    ledger = Ledger(path, keep=10)
    for turn in range(20):
        ledger.acknowledge("t", finish(ledger, f"r{2 * turn}", f"r{2 * turn + 1}", samples=3))
    counters = ledger.counters
    assert (counters.requested, counters.unique, counters.acknowledged, counters.kept) == (120, 120, 120, 10)
    ledger.close()
    db = sqlite3.connect(path)
    assert db.execute("SELECT COUNT(*) FROM requests").fetchone() == (10,)
    assert db.execute("SELECT COUNT(*) FROM trajectories").fetchone() == (0,)
    db.close()
    again = Ledger(path, keep=4)
    assert again.counters == counters
    record(again, request("r39", 3), request("r0", 3), batch="again")
    leased = again.lease(ROOM)
    assert leased == (21, [request("r0", 3)])
    assert record(again, request("r39", 3), batch="more") == ([3], [])
    again.acknowledge("t", finish(again, "last"))
    assert again.counters.kept == 4
    again.close()


def test_what_is_not_acknowledged_is_kept_whatever_its_age(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite", keep=0)
    finish(ledger, "old", samples=2)
    record(ledger, request("bad"), batch="bad")
    ledger.record([Completed(ledger.lease(ROOM)[0], "bad", error="too long")])  # type: ignore[index]
    ledger.acknowledge("t", [("old", 1)])
    for turn in range(5):
        ledger.acknowledge("t", finish(ledger, f"r{turn}"))
    assert [(p.request_id, p.sample) for p in ledger.pending("t", 0)] == [("old", 0), ("bad", FAILURE)]
    ledger.acknowledge("t", [("old", 0), ("bad", FAILURE)])
    assert ledger.counters.kept == 0
    ledger.close()


def test_a_file_that_was_large_is_given_back(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    pairs = [(request(f"r{i}"), bytes(800_000)) for i in range(40)]
    ledger.record_requests("t", "b", 0, pairs, True)
    assert ledger.size()[0] > 30e6
    ledger._file.run("UPDATE requests SET state=2, epoch=1")
    ledger.record([done(1, r, 0) for r, _ in pairs])
    for r, _ in pairs:
        ledger.acknowledge("t", [(r.id, 0)])
    size, free = ledger.size()
    assert free < size < 18e6
    ledger.close()


def test_another_format_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID")
    db.execute("CREATE TABLE requests (seq INTEGER PRIMARY KEY, id TEXT)")
    db.execute("INSERT INTO meta VALUES ('format', 1)")
    db.commit()
    db.close()
    with pytest.raises(StorageError, match="has ledger format 1, this version writes 2; finish it with"):
        Ledger(path)


def test_acknowledged_payloads_are_freed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    size = 0
    for turn in range(30):
        asked = [request(f"{turn}-{i}", max_tokens=400) for i in range(20)]
        record(ledger, *asked, batch=str(turn))
        epoch = ledger.lease(ROOM)[0]  # type: ignore[index]
        ledger.record([done(epoch, r, 0) for r in asked])
        ledger.acknowledge("t", [(r.id, 0) for r in asked])
        if turn == 4:
            size = (tmp_path / "l.sqlite").stat().st_size
    ledger.close()
    assert (tmp_path / "l.sqlite").stat().st_size < 2 * max(size, 1 << 20)


def test_one_process_at_a_time_and_bad_files(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="another gateway holds it"):
        Ledger(ledger.path)
    with pytest.raises(StorageError, match="create its folder"):
        Ledger(tmp_path / "none" / "l.sqlite")
    (tmp_path / "text").write_text("not a ledger at all" * 100)
    with pytest.raises(StorageError, match="not a database"):
        Ledger(tmp_path / "text")


def test_client_ids_belong_to_the_key_that_used_them_first(ledger: Ledger) -> None:
    ledger.claim("t", "key")
    ledger.claim("t", "key")
    with pytest.raises(TransportError, match="another key"):
        ledger.claim("t", "other")


def fill(path: Path, ledger: Ledger) -> list[str]:
    """Records until nothing fits, closes; returns the ids that were reported as recorded."""
    recorded: list[str] = []
    asked = [request(f"r{i}", prompt=range(1, 4000)) for i in range(1000)]
    with pytest.raises(StorageError, match="free disk space") as caught:
        for i, r in enumerate(asked):
            record(ledger, r, request(f"s{i}"), batch=r.id)
            recorded += [r.id, f"s{i}"]
    assert str(path) in str(caught.value)
    with pytest.raises(StorageError):
        record(ledger, request("big", prompt=range(1, 100_000)))
    assert ledger.counters.requested == len(recorded) > 4
    ledger.close()
    return recorded


def check_holds(path: Path, recorded: list[str]) -> None:
    """What was reported is there, what failed has left nothing."""
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert sorted(r[0] for r in db.execute("SELECT id FROM requests")) == sorted(recorded)
    db.close()


def test_full_ledger_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    check_holds(path, fill(path, Ledger(path, max_bytes=1 << 20)))
    again = Ledger(path, max_bytes=8 << 20)
    record(again, request("big", prompt=range(1, 100_000)))
    again.close()


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting a small disk takes root")
def test_full_disk_changes_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a tmpfs")
    try:
        recorded = fill(disk / "l.sqlite", Ledger(disk / "l.sqlite"))
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        check_holds(disk / "l.sqlite", recorded)
        again = Ledger(disk / "l.sqlite")
        record(again, request("big", prompt=range(1, 100_000)))
        again.close()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


KILLED = """
import sys
sys.path.insert(0, sys.argv[2])
from bridge_parts import make_trajectory, request
from blockroll.rollout.backend import Completed
from blockroll.trainer_bridge.ledger import Ledger
from blockroll.trainer_bridge.records import FAILURE, encode_request
ledger = Ledger(sys.argv[1])
for i in range(10**6):
    asked = request(f"r{i}", 2)
    ledger.record_requests("t", str(i), 0, [(asked, encode_request(asked))], True)
    epoch, _ = ledger.lease(10)
    ledger.record([Completed(epoch, asked.id, make_trajectory(asked, 0))])
    print(i, flush=True)
"""


def test_killed_writer_leaves_everything_it_reported(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path), str(Path(__file__).parent)], stdout=subprocess.PIPE,
                          text=True) as writer:
        assert writer.stdout is not None
        for _ in range(25):
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        last = max(int(line) for line in ["24", *writer.stdout.read().split("\n")[:-1]])
    ledger = Ledger(path)
    assert ledger.counters.unique >= last + 1
    assert [p.request_id for p in ledger.pending("t", 0, 10**9)][:last + 1] == [f"r{i}" for i in range(last + 1)]
    redone = 0
    while ledger.lease(ROOM) is not None:
        redone += 1
    assert redone >= last + 1
    ledger.close()
