"""What operators ask of a gateway: its engines, another number of them, a drain that loses nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from bridge_parts import ToyBackend, request, until, weights, working

from blockroll.errors import ClusterError, StorageError, TransportError
from blockroll.rollout.cluster.spec import EngineStatus
from blockroll.trainer_bridge.client import ServiceControl, connect
from blockroll.trainer_bridge.gateway import Gateway, ledger_policy
from blockroll.trainer_bridge.gateway.ledger import Ledger
from blockroll.trainer_bridge.wire.key_files import load_client_keys, load_server_keys, make_keys

Serve = Callable[..., Gateway]


class Scaled(ToyBackend):
    """Lists engines, up to seven of which it has."""

    wanted = 70

    def engines(self) -> list[EngineStatus]:
        return [EngineStatus(i, 100 + i, "node", "cpu", "idle", self.version, 2.5, figures={"queue": i})
                for i in range(self.wanted)]  # fmt: skip

    def scale(self, engines: int) -> None:
        if engines > 7:
            raise ClusterError(f"engines: {engines} are too many; use at most 7")
        self.wanted = engines


def test_engines_come_in_pages_and_their_number_changes(serve: Serve) -> None:
    with ServiceControl(serve(Scaled()).address) as control:
        status = control.status()
        assert [engine.id for engine in status.engines] == list(range(70))
        assert status.engines[69].figures == (("queue", 69.0),) and status.figures["version"] == 0
        with pytest.raises(ClusterError, match="9 are too many; use at most 7"):
            control.scale(9)
        control.scale(3)
        for _ in range(40):
            if len(control.status().engines) == 3:
                return
            threading.Event().wait(0.05)
    pytest.fail("the number of engines did not change")


def test_a_backend_of_fixed_size_refuses(serve: Serve) -> None:
    with ServiceControl(serve(ToyBackend()).address) as control:
        assert control.status().engines == ()
        with pytest.raises(ClusterError, match="fixed number"):
            control.scale(2)


def test_a_drain_ends_what_is_leased_and_begins_nothing(serve: Serve, tmp_path: Path) -> None:
    gateway = serve(ToyBackend(rate=100), max_in_flight=40)
    with connect(gateway.address, client_id="t") as client, ServiceControl(gateway.address) as control:
        for i in range(5):
            client.submit([request(f"r{i}", samples=30)])
        assert control.stop(drain=True, timeout=30)
        assert gateway.wait(10)
        client.close(acknowledge=False)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    recorded, counters = [len(ledger.pending("t", 0))], ledger.counters
    ledger.close()
    # Whole requests are leased: what was leased is recorded, and at least one request was never leased.
    assert 0 < counters.unique < counters.requested == 150 and counters.unique % 30 == 0 and recorded == [counters.unique]


def test_operators_need_the_control_key(tmp_path: Path, serve: Serve) -> None:
    folder = make_keys(tmp_path / "keys")
    assert make_keys(folder) == folder
    gateway, keys = serve(ToyBackend(), keys=load_server_keys(folder)), load_client_keys(folder)
    with ServiceControl(gateway.address, keys=keys) as control:
        assert control.status().figures["requested"] == 0
    with connect(gateway.address, keys=folder) as client:
        assert client.status()["version"] == 0
    (folder / "control.key").unlink()
    with pytest.raises(TransportError, match="control key"):
        ServiceControl(gateway.address, keys=load_client_keys(folder))
    with pytest.raises(StorageError, match=r"holds server\.key and no control\.key"):
        make_keys(folder)


def test_a_ledger_belongs_to_one_policy_once_it_is_used(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger_policy.claim(path, "one", "11")
    ledger_policy.claim(path, "two", "22")  # nothing was asked of the first
    ledger = Ledger(path)
    ledger.record_version(1, b"x")
    ledger.close()
    ledger_policy.claim(path, "moved", "22")
    with pytest.raises(StorageError, match=r"belongs to another policy \(two, "):
        ledger_policy.claim(path, "one", "11")


def test_a_drain_waits_for_a_commit_and_takes_no_other_push(serve: Serve, tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Slow(ToyBackend):
        def commit_weights(self, version: int, arrays: Mapping[str, np.ndarray]) -> None:
            begun.set()
            assert go_on.wait(20)
            super().commit_weights(version, arrays)

    gateway = serve(Slow())
    with (connect(gateway.address, client_id="t") as client, connect(gateway.address, client_id="late") as late,
          ServiceControl(gateway.address) as control, ThreadPoolExecutor() as pool):  # fmt: skip
        pushed = pool.submit(client.push_weights, 1, weights(1))
        assert begun.wait(10)
        stopped = pool.submit(control.stop, drain=True, timeout=30)
        until(lambda: gateway._operations.draining)
        with pytest.raises(TransportError, match="weight version 1 is being committed"):
            late.push_weights(2, weights(2), allow_gap=True)
        assert not gateway.wait(0.5)
        go_on.set()
        assert pushed.result(10) == 1 and stopped.result(20) and gateway.wait(10)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    last = ledger.last_version()
    ledger.close()
    assert last is not None and last[0] == 1


def test_a_push_that_begins_while_the_gateway_drains_is_refused(serve: Serve) -> None:
    backend = ToyBackend(rate=0.0)
    gateway = serve(backend)
    with working(gateway, request("a")) as (client, control), ThreadPoolExecutor() as pool:
        stopped = pool.submit(control.stop, drain=True, timeout=30)
        until(lambda: gateway._operations.draining)
        with pytest.raises(TransportError, match="weight version 1 is not taken: the service drains and stops"):
            client.push_weights(1, weights(1))
        backend.rate = 1e9
        assert stopped.result(20)
