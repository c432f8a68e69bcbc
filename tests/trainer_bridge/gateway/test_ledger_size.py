"""The ledger's statements and its size do not grow with what it has seen."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from bridge_parts import done, record, request

from blockroll.rollout.backend import Completed
from blockroll.trainer_bridge.gateway.batch_parts import Part
from blockroll.trainer_bridge.gateway.ledger import Ledger
from blockroll.trainer_bridge.wire.records import FAILURE

ROOM = 10**6


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
    ledger = Ledger(path, keep=1)
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
    ledger.record_parts([Part("t", "b", 0, pairs, True)])
    assert ledger.size()[0] > 30e6
    ledger._file.run("UPDATE requests SET state=2, epoch=1")
    ledger.record([done(1, r, 0) for r, _ in pairs])
    for r, _ in pairs:
        ledger.acknowledge("t", [(r.id, 0)])
    size, free = ledger.size()
    assert free < size < 18e6
    ledger.close()


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
