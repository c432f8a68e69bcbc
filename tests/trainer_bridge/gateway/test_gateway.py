"""The gateway: whole batches, trouble told and outlived."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bridge_parts import ToyBackend, request, until, weights

from blockroll.errors import ClusterError, StorageError, TransportError
from blockroll.rollout.backend import Completed
from blockroll.trainer_bridge.client import RequestRefused, connect
from blockroll.trainer_bridge.client.connection import Connection
from blockroll.trainer_bridge.gateway import Gateway, message_router
from blockroll.trainer_bridge.gateway.backend_driver import BackendDriver
from blockroll.trainer_bridge.wire.messages import Shutdown, Stopping

Serve = Callable[..., Gateway]


def test_a_batch_reaches_the_cluster_whole_and_in_order(serve: Serve) -> None:
    backend = ToyBackend()
    with connect(serve(backend, max_in_flight=50).address) as client:
        names = [f"r{i * 7919 % 500}" for i in range(500)]
        client.generate([request(n) for n in names])
        client.generate([request("x"), request("y")])
    assert backend.batches == [(1, names), (2, ["x", "y"])]


def test_leased_work_is_bounded(serve: Serve) -> None:
    backend = ToyBackend(rate=0.0)
    with connect(serve(backend, max_in_flight=10).address) as client:
        for i in range(8):
            client.submit([request(f"r{i}", 4)])
        until(lambda: len(backend.batches) == 2)
        assert client.status()["in_flight"] == 8
        backend.rate = 1e9
        assert len(list(client.results())) == 32


def test_backend_that_repeats_itself(serve: Serve) -> None:
    with connect(serve(ToyBackend(repeat=True)).address) as client:
        assert len(client.generate([request("a", 10), request("b", 10)])) == 20
        status = client.status()
        assert (status["requested"], status["unique"], status["duplicates"], status["missing"]) == (20, 20, 20, 0)
        assert client.delivery["duplicates"] == 0


def test_lost_lease_is_given_again_and_its_late_output_refused(serve: Serve) -> None:
    class Forgetful(ToyBackend):
        """Sits on its first lease until the second has come."""

        def poll(self, timeout: float) -> list[Completed]:
            return [] if len(self.batches) < 2 else super().poll(timeout)

    backend = Forgetful()
    with connect(serve(backend, lease_seconds=0.3).address) as client:
        assert len(client.generate([request("a", 3)])) == 3
        until(lambda: int(client.status()["stale"]) >= 3)
        assert client.status()["unique"] == 3
    epochs = [epoch for epoch, _ in backend.batches]
    assert epochs == list(range(1, len(epochs) + 1))


def test_cluster_without_engines_is_a_notice_and_outlived(serve: Serve) -> None:
    backend = ToyBackend()
    backend.broken = "no live actor"
    with connect(serve(backend).address) as client:
        with pytest.raises(TransportError, match="no live actor"):
            client.generate([request("a")], timeout=1.5)
        assert "no live actor" in str(client.status()["notice"])
        backend.broken = ""
        assert len(client.generate([request("a")], timeout=10)) == 1
        assert client.status()["notice"] == ""


def test_a_refusal_of_work_is_told_while_there_is_work(serve: Serve) -> None:
    backend = ToyBackend()
    backend.broken = "no live actor"
    with connect(serve(backend).address) as client:
        client.submit([request("a")])
        until(lambda: "no live actor" in str(client.status()["notice"]))
        client.cancel(["a"])
        assert client.status()["notice"] == ""


def test_a_refusal_of_work_is_told_until_engines_answer() -> None:
    backend = ToyBackend(rate=0.0)
    driver = BackendDriver(backend, lambda: None)
    try:
        driver.submit(1, [request("runs")], ["t"])
        until(lambda: len(backend.batches) == 1)
        backend.broken = "no live actor"
        driver.submit(2, [request("refused")], ["t"])
        until(lambda: driver.notices(waiting=True) == ["no live actor"])
        backend.rate = 1e9
        until(lambda: not driver.notices(waiting=True))
    finally:
        assert driver.stop(10)


def test_bug_of_the_backend_ends_the_gateway_and_is_raised(tmp_path: Path) -> None:
    class Buggy(ToyBackend):
        def poll(self, timeout: float) -> list[Completed]:
            if self.batches:
                raise KeyError("bug")
            return []

    gateway = Gateway(Buggy(), "tcp://127.0.0.1:*", tmp_path / "l").start()
    with connect(gateway.address) as client, pytest.raises(ClusterError, match="KeyError"):
        client.generate([request("a")])
    with pytest.raises(KeyError):
        gateway.stop()


def test_client_that_was_busy_elsewhere_hears_why_the_gateway_ended(tmp_path: Path) -> None:
    class Buggy(ToyBackend):
        def poll(self, timeout: float) -> list[Completed]:
            raise KeyError("bug")

    backend = ToyBackend()
    gateway = Gateway(backend, "tcp://127.0.0.1:*", tmp_path / "l").start()
    with connect(gateway.address) as client:
        client.generate([request("a")])
        backend.__class__ = Buggy
        with pytest.raises(KeyError):
            gateway.wait(20)
        with pytest.raises(ClusterError, match="KeyError"):
            client.submit([request("b")])


def test_full_disk_is_an_error_for_who_submits_and_a_wait_for_who_waits(serve: Serve) -> None:
    gateway = serve(ToyBackend(rate=0.0), max_ledger_bytes=400_000)
    backend: Any = gateway._cluster
    with connect(gateway.address) as client:
        with pytest.raises(StorageError, match="free disk space"):
            for i in range(100):
                client.submit([request(f"r{i}", prompt=range(1, 5000))])
        assert client.status()["missing"] == client.delivery["missing"] > 0
        backend.longest, backend.rate = 10**6, 1e9
        until(lambda: client.status()["in_flight"] == 0)
        gateway._ledger._file.run("PRAGMA max_page_count=1000000")
        client.submit([request("more", prompt=range(1, 5000))])
        assert len(list(client.results(timeout=10))) == client.delivery["requested"]
        assert client.delivery["missing"] == 0
        assert client.status()["notice"] == ""


def test_disk_that_stays_full_ends_a_gateway_of_little_patience(tmp_path: Path) -> None:
    backend = ToyBackend()
    gateway = Gateway(backend, "tcp://127.0.0.1:*", tmp_path / "l", max_ledger_bytes=250_000, disk_patience=0.5).start()
    with connect(gateway.address) as client:
        with pytest.raises(StorageError, match="free disk space"):
            client.generate([request(f"r{i}", 8) for i in range(200)])
    with pytest.raises(StorageError, match="free disk space"):
        gateway.wait(10)


def test_trouble_with_an_acknowledgement_ends_with_its_session(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client whose acknowledgement met a full disk goes for good; then there is room again."""
    monkeypatch.setattr(message_router, "PROBE_S", 0.1)
    gateway = serve(ToyBackend(), disk_patience=2.0)
    gone = connect(gateway.address, ack="manual")
    found = gone.generate([request("a")])
    gateway._ledger._file.run("PRAGMA query_only=1")
    with gone._loop.lock:
        gone._loop.acknowledge([t.key for t in found])
        gone._loop.run_until(lambda: gateway._router.ack_error is not None)
    gone.close(acknowledge=False)
    until(lambda: len(gateway._router._sessions) == 0)
    gateway._ledger._file.run("PRAGMA query_only=0")
    assert not gateway.wait(2.5)
    with connect(gateway.address) as client:
        assert client.status()["notice"] == ""


def test_a_start_that_fails_lets_go_of_the_ledger(tmp_path: Path) -> None:
    class Dead(ToyBackend):
        def stats(self) -> dict[str, float | int | str]:
            raise ClusterError("no live actor")

    path = tmp_path / "l"
    for backend, address, error in ((Dead(), "tcp://127.0.0.1:*", ClusterError), (ToyBackend(), "tcp://1:1", TransportError)):
        gateway = Gateway(backend, address, path)
        with pytest.raises(error):
            gateway.start()
        with Gateway(ToyBackend(), "tcp://127.0.0.1:*", path):
            pass


def test_the_size_of_the_ledger_is_shown(serve: Serve) -> None:
    with connect(serve(ToyBackend(), keep_requests=3).address) as client:
        client.generate([request(f"r{i}") for i in range(10)])
        client.generate([request("last")])
        status = client.status()
        assert status["ledger_kept"] == 3
        assert 0 <= int(status["ledger_free_bytes"]) < int(status["ledger_bytes"])


def test_shutdown_over_the_control_plane(serve: Serve) -> None:
    gateway = serve(ToyBackend())
    with connect(gateway.address) as client:
        client.shutdown_gateway()
    assert gateway.wait(10)


def test_a_gateway_stays_until_who_stopped_it_has_heard_so(serve: Serve) -> None:
    gateway = serve(ToyBackend())
    deaf = Connection(gateway.address, "deaf", keys=None, control=True, timeout=10)
    deaf.open()
    deaf.send(Shutdown())
    assert not gateway.wait(0.5)
    assert any(isinstance(m, Stopping) for m in deaf.receive(5))
    deaf.drop()
    assert gateway.wait(2)


def test_an_error_in_many_bytes_reaches_the_client_and_the_gateway_goes_on(serve: Serve) -> None:
    """Limits of texts count bytes; a thousand characters may be three thousand."""
    backend = ToyBackend()
    gateway = serve(backend)
    backend.broken = "引擎" * 600
    with connect(gateway.address) as client:
        with pytest.raises(ClusterError, match="引擎"):
            client.push_weights(1, weights())
        with pytest.raises(TransportError, match="引擎"):
            client.generate([request("a")], timeout=1.5)
        backend.broken = ""
        assert len(client.generate([request("a")], timeout=10)) == 1


def test_a_batch_of_which_a_part_finds_no_room_is_refused_whole(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts that come behind it would fit."""
    monkeypatch.setattr(message_router, "MAX_PART_BYTES", 0)  # each part is a transaction
    backend = ToyBackend(longest=10**6)
    large = [request(f"large{i}", prompt=range(10_000)) for i in range(32)]
    with connect(serve(backend, max_ledger_bytes=300_000).address) as client:
        with pytest.raises(StorageError, match="full"):
            client.submit([*large, request("small")])
        assert not client.status()["requested"] and not backend.batches
        assert client.delivery == {"requested": 0, "unique": 0, "duplicates": 0, "failed": 0, "missing": 0}
        assert len(client.generate([request("small", 2)], timeout=10)) == 2


def test_what_came_of_a_refused_batch_is_nobodys_unfinished_work(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts before the one that finds no room were recorded. The client submits something else."""
    monkeypatch.setattr(message_router, "MAX_PART_BYTES", 0)  # each part is a transaction
    small, large = [request(f"small{i}") for i in range(32)], [request(f"large{i}", prompt=range(20_000)) for i in range(32)]
    gateway = serve(ToyBackend(longest=10**6), max_ledger_bytes=300_000, max_client_samples=64)
    with connect(gateway.address) as client:
        with pytest.raises(StorageError, match="full"):
            client.submit([*small, *large])
        until(lambda: client.status()["outstanding"] == 0)
        assert len(client.generate([request("other", 40)], timeout=10)) == 40
        assert len(client.generate(small, timeout=10)) == 32 and client.status()["requested"] == 72


def test_leases_commits_retries_and_refusals_are_logged(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="blockroll.trainer_bridge.gateway")
    backend = ToyBackend()
    gateway = serve(backend)
    backend.broken = "no live actor"
    with connect(gateway.address, client_id="t") as client:
        client.submit([request("a"), request("b")])
        until(lambda: "not taken" in caplog.text)
        with pytest.raises(ClusterError):
            client.push_weights(1, weights())
        backend.broken = ""
        client.generate([request("a"), request("b")], timeout=10)
        client.push_weights(1, weights())
    with connect(gateway.address, client_id="u") as client, pytest.raises(RequestRefused):
        client.generate([request("a")])
    lines = [(r.name.removeprefix("blockroll.trainer_bridge."), r.levelname, r.getMessage()) for r in caplog.records]
    for wanted in (("INFO", "lease 1: 2 requests"), ("WARNING", "lease 1 is not taken by the cluster: no live actor"),
                   ("INFO", "lease 1 is over; its unfinished work is leased again"), ("INFO", "lease 2: 2 requests"),
                   ("WARNING", "weight version 1 is not committed: no live actor"), ("INFO", "weight version 1 is committed")):
        assert ("gateway", *wanted) in lines
    assert any("request a of client u is refused" in text for _, _, text in lines)


def test_a_disk_that_is_full_is_logged_once_until_there_is_room(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="blockroll.trainer_bridge.gateway")
    backend = ToyBackend(rate=0.0)
    gateway = serve(backend)
    with connect(gateway.address) as client:
        client.submit([request("a")])
        until(lambda: bool(backend.batches))
        gateway._ledger._file.run("PRAGMA query_only=1")
        backend.rate = 1e9
        until(lambda: "readonly" in str(client.status()["notice"]))
        time.sleep(1.2)
        gateway._ledger._file.run("PRAGMA query_only=0")
        assert len(list(client.results(timeout=10))) == 1
        until(lambda: "can record again" in caplog.text)
    assert caplog.text.count("cannot record, trying again") == 1


@pytest.mark.parametrize("work", ["record", "dispatch", "acknowledge"])
def test_trouble_is_forgotten_once_the_disk_works_though_every_client_is_gone(
        serve: Serve, monkeypatch: pytest.MonkeyPatch, work: str) -> None:
    """A full disk stops one kind of work; the client goes for good; then there is room, for longer than the patience."""
    monkeypatch.setattr(message_router, "PROBE_S", 0.1)
    backend = ToyBackend(rate=0.0)
    gateway = serve(backend, disk_patience=1.5, max_in_flight=2)
    client = connect(gateway.address, client_id="gone", ack="manual")
    client.submit([request("a", 2)])
    client.submit([request("b", 2)])
    until(lambda: len(backend.batches) == 1)
    if work == "acknowledge":
        backend.rate = 1e9
        found = list(client.results(timeout=10))
    gateway._ledger._file.run("PRAGMA query_only=1")
    with contextlib.suppress(StorageError, TransportError):
        if work == "acknowledge":
            with client._loop.lock:
                client._loop.acknowledge([t.key for t in found])
                client._loop.run_until(lambda: gateway._router.ack_error is not None)
        elif work == "dispatch":
            gateway._revoked.add(1)
            gateway._wake()
        else:
            backend.rate = 1e9
    until(lambda: bool(gateway._retries.notices()))
    client.close(acknowledge=False)
    until(lambda: len([s for s in gateway._router._sessions if not s.control]) == 0)
    gateway._ledger._file.run("PRAGMA query_only=0")
    until(lambda: not gateway._retries.notices())
    gateway._ledger._file.run("PRAGMA query_only=1")
    time.sleep(0.3)
    gateway._ledger._file.run("PRAGMA query_only=0")
    assert not gateway.wait(2.0)
    assert not gateway._retries.notices()
