"""The ledger: nothing recorded is lost, nothing is recorded twice, a full disk changes nothing."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from bridge_parts import assert_same, done, make_trajectory, record, request

from blockroll.errors import StorageError, TransportError
from blockroll.rollout.backend import Completed
from blockroll.trainer_bridge.gateway.aborting import Aborted
from blockroll.trainer_bridge.gateway.batch_parts import Part
from blockroll.trainer_bridge.gateway.ledger import Ledger
from blockroll.trainer_bridge.gateway.ledger_file import LedgerFile
from blockroll.trainer_bridge.wire.records import FAILURE, decode_trajectory, encode_request

ROOM = 10**6


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(tmp_path / "ledger.sqlite")
    yield made
    made.close()


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


def test_a_client_that_comes_back_owes_no_batch_that_it_had_not_finished(tmp_path: Path) -> None:
    """It submits all of it again, or something else."""
    with closing(Ledger(tmp_path / "l", max_client_samples=8)) as ledger:
        record(ledger, request("queued", 2))
        record(ledger, request("a", 6), batch="c", final=False)
        assert record(ledger, request("b", 6), batch="d")[1] and ledger.outstanding == 8
        record(ledger, request("theirs", 6), client="other", final=False)
        ledger.resume("t")
        assert record(ledger, request("b", 6), batch="d")[1] == [] and ledger.outstanding == 14
        assert ledger.lease(ROOM) == (1, [request("queued", 2)]) and ledger.lease(ROOM) == (2, [request("b", 6)])
        ledger.forget_batches([("other", "b"), ("t", "b"), ("nobody", "z")])
        assert ledger.outstanding == 8 and ledger.counters.requested == 8


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
        ledger.record_parts([Part("t", "b", 0, pairs, True)])
    assert ledger.lease(ROOM) is None
    assert ledger.counters.requested == 0
    assert record(ledger, request("a", prompt=[9])) == ([0], [])


@pytest.mark.parametrize("damaged", [False, True])
def test_an_abort_or_a_lease_that_the_disk_refuses_leaves_the_work_queued(
    damaged: bool, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    asked, run, full = request("a", samples=2), LedgerFile.run, [True]
    record(ledger, asked)
    if damaged:
        ledger._file.run("UPDATE requests SET payload=x'00'")

    def refused(self: LedgerFile, statement: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        if full and "INTO trajectories" in statement:
            raise sqlite3.OperationalError("database or disk is full")
        return run(self, statement, values)

    monkeypatch.setattr(LedgerFile, "run", refused)
    every = Aborted(None, ledger.newest())
    with pytest.raises(StorageError):
        ledger.lease(ROOM) if damaged else ledger.abort_queued(every)
    assert not ledger.any_leased() and ledger.counters.unique == ledger.counters.failed == 0
    full.clear()
    assert ledger.abort_queued(every) == {"t"} and not ledger.any_open(every)
    assert (ledger.counters.unique, ledger.counters.failed, ledger.counters.missing) == ((0, 2, 0) if damaged else (2, 0, 0))


def test_an_abort_that_waits_asks_the_file_once_for_all_its_requests(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    names, run, said = [f"r{i}" for i in range(100)], LedgerFile.run, list[str]()
    record(ledger, *map(request, names))
    ledger.lease(ROOM)

    def counted(self: LedgerFile, statement: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        said.append(statement)
        return run(self, statement, values)

    monkeypatch.setattr(LedgerFile, "run", counted)
    every = Aborted(names, 1000)
    assert ledger.any_open(every) and len(said) == 1
    assert ledger.abort_queued(every) == set() and len(said) == 2
    plans = [run(ledger._file, f"EXPLAIN QUERY PLAN {sql}", (None,) * sql.count("?")).fetchall() for sql in said]
    assert all("(id=?" in str(plan) for plan in plans), plans


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


def test_another_format_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID")
    db.execute("CREATE TABLE requests (seq INTEGER PRIMARY KEY, id TEXT)")
    db.execute("INSERT INTO meta VALUES ('format', 1)")
    db.commit()
    db.close()
    with pytest.raises(StorageError, match="has ledger format 1, this version writes 3; finish it with"):
        Ledger(path)


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
from blockroll.trainer_bridge.gateway.batch_parts import Part
from blockroll.trainer_bridge.gateway.ledger import Ledger
from blockroll.trainer_bridge.wire.records import FAILURE, encode_request
ledger = Ledger(sys.argv[1])
for i in range(10**6):
    asked = request(f"r{i}", 2)
    ledger.record_parts([Part("t", str(i), 0, [(asked, encode_request(asked))], True)])
    epoch, _ = ledger.lease(10)
    ledger.record([Completed(epoch, asked.id, make_trajectory(asked, 0))])
    print(i, flush=True)
"""


def test_killed_writer_leaves_everything_it_reported(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path), str(Path(__file__).parents[1])], stdout=subprocess.PIPE,
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
