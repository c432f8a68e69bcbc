"""A damaged ledger: one row fails its own request by name, a file that is gone ends the gateway."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from bridge_parts import ToyBackend, done, record, request, until

from blockroll.errors import StorageError
from blockroll.trainer_bridge.client import RequestRefused, connect
from blockroll.trainer_bridge.gateway import Gateway
from blockroll.trainer_bridge.gateway.kept_work import kept_work
from blockroll.trainer_bridge.gateway.ledger import Ledger

Serve = Callable[..., Gateway]


def change(path: Path, statement: str, *values: object) -> None:
    db = sqlite3.connect(path)
    with db:
        assert db.execute(statement, values).rowcount == 1
    db.close()


@pytest.mark.parametrize(("column", "value"), [
    ("payload", b"\x01\x02\x03"), ("payload", None), ("payload", "text"), ("payload", 7), ("payload", b""),
    ("digest", b"other"), ("samples", 3), ("samples", "many")])
def test_a_damaged_request_fails_by_name_and_the_others_go_on(tmp_path: Path, column: str, value: object) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    record(ledger, request("a", 2), request("bad", 2), request("c"), client="t")
    ledger.close()
    change(path, f"UPDATE requests SET {column}=? WHERE id='bad'", value)
    with Gateway(ToyBackend(), "tcp://127.0.0.1:*", path) as gateway, connect(gateway.address, client_id="t") as client:
        # Of a damaged digest the client may hear when it asks for the request again, before the request is leased.
        why = "row of request 'bad' is damaged" + ("|'bad' was already used" if column == "digest" else "")
        with pytest.raises(RequestRefused, match=why):
            client.generate([request("a", 2), request("bad", 2), request("c")], timeout=10)
        assert sorted(t.key for t in client.results(timeout=10)) == [("a", 0), ("a", 1), ("c", 0)]
        assert client.delivery["missing"] == 0
        assert client.generate([request("after")])[0].request_id == "after"


def test_a_batch_of_damaged_requests_alone_is_not_handed_to_the_cluster(tmp_path: Path) -> None:
    path, backend = tmp_path / "ledger.sqlite", ToyBackend()
    ledger = Ledger(path)
    record(ledger, request("bad", 2), client="t")
    ledger.close()
    change(path, "UPDATE requests SET payload=? WHERE id='bad'", b"\x01")
    with Gateway(backend, "tcp://127.0.0.1:*", path) as gateway, connect(gateway.address, client_id="t") as client:
        with pytest.raises(RequestRefused, match="row of request 'bad' is damaged"):
            client.generate([request("bad", 2)], timeout=10)
        assert client.generate([request("after")])[0].request_id == "after"
    assert [ids for _, ids in backend.batches] == [["after"]]


@pytest.mark.parametrize("value", [b"\x01\x02\x03", None, "text", b"", b"other"])
def test_a_damaged_trajectory_fails_its_request_by_name(tmp_path: Path, value: object) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    bad, good = request("bad", 3), request("good", 2)
    record(ledger, bad, good, client="t")
    ledger.lease(100)
    ledger.record([done(1, bad, 0), done(1, good, 0), done(1, bad, 1), done(1, good, 1)])
    ledger.close()
    if value == b"other":
        change(path, "UPDATE trajectories SET payload=(SELECT payload FROM trajectories WHERE request_id='good' AND sample=0) "
                     "WHERE request_id='bad' AND sample=0")
    else:
        change(path, "UPDATE trajectories SET payload=? WHERE request_id='bad' AND sample=0", value)
    with Gateway(ToyBackend(), "tcp://127.0.0.1:*", path) as gateway, connect(gateway.address, client_id="t") as client:
        with pytest.raises(RequestRefused, match="row of request 'bad', sample 0, is damaged"):
            client.generate([bad, good], timeout=10)
        assert sorted(t.key for t in client.results(timeout=10)) == [("bad", 1), ("good", 0), ("good", 1)]
        assert client.delivery["missing"] == 0
        status = client.status()
        assert (status["requested"], status["unique"], status["failed"], status["missing"]) == (5, 3, 2, 0)
    with Gateway(ToyBackend(), "tcp://127.0.0.1:*", path) as gateway, connect(gateway.address, client_id="t") as client:
        with pytest.raises(RequestRefused):
            client.generate([bad], timeout=10)


def test_damaged_counters_are_named(tmp_path: Path) -> None:
    Ledger(tmp_path / "l").close()
    change(tmp_path / "l", "UPDATE counters SET [unique]='x'")
    with pytest.raises(StorageError, match="its counters are damaged"):
        Ledger(tmp_path / "l")


def remove(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    shutil.copy(path, path.with_name("copy"))
    os.replace(path.with_name("copy"), path)


def remove_log(path: Path) -> None:
    path.with_name(path.name + "-wal").unlink()


@pytest.mark.parametrize("harm", [remove, replace, remove_log])
@pytest.mark.parametrize("busy", [False, True])
def test_a_ledger_that_is_gone_ends_the_gateway_and_nothing_is_confirmed(
        tmp_path: Path, harm: Callable[[Path], None], busy: bool) -> None:
    path = tmp_path / "ledger.sqlite"
    gateway = Gateway(ToyBackend(rate=100.0), "tcp://127.0.0.1:*", path).start()
    with connect(gateway.address, client_id="t", timeout=5) as client:
        client.generate([request("a")])
        if busy:
            client.submit([request("b", 500)])
        harm(path)
        with pytest.raises(StorageError, match=r"ledger\.sqlite.* (was deleted|was replaced)"):
            client.submit([request("c")])
            client.generate([request("d")])
    with pytest.raises(StorageError, match="while the gateway ran"):
        gateway.wait(10)


def test_an_idle_gateway_notices(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    gateway = Gateway(ToyBackend(), "tcp://127.0.0.1:*", path).start()
    path.unlink()
    with pytest.raises(StorageError, match="was deleted"):
        until(lambda: gateway.wait(1.0))


def test_a_write_to_a_ledger_that_is_gone_is_no_success(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    record(ledger, request("a"))
    (tmp_path / "l").unlink()
    with pytest.raises(StorageError, match="was deleted"):
        record(ledger, request("b"), batch="c")
    assert ledger.counters.requested == 1
    ledger.close()


@pytest.mark.parametrize("key", ["format", "ledger", "epoch"])
def test_a_ledger_without_a_row_of_its_own_is_refused(key: str, tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    Ledger(path).close()
    assert kept_work(path) == (0, 0)
    change(path, "DELETE FROM meta WHERE key=?", key)
    with pytest.raises(StorageError, match=f"row '{key}' is damaged"):
        Ledger(path)
    if key == "format":
        with pytest.raises(StorageError, match="is damaged"):
            kept_work(path)


def test_asking_what_a_ledger_keeps_makes_no_ledger(tmp_path: Path) -> None:
    """Of a file that is empty, and of a database of something else, which a misspelt configuration may name."""
    empty, other = tmp_path / "empty ? 100%", tmp_path / "runs.db"
    empty.touch()
    with closing(sqlite3.connect(other)) as database, database:
        database.execute("CREATE TABLE runs (id)")
    before = other.read_bytes()
    assert kept_work(empty) == (0, 0)
    with pytest.raises(StorageError, match="is no ledger"):
        kept_work(other)
    assert other.read_bytes() == before and not empty.stat().st_size
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted([empty.name, other.name])
    Ledger(empty).close()
    assert kept_work(empty) == (0, 0)  # a name that a URI has to quote
