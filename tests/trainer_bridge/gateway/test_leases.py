"""Which leases a gateway and its driver know: those whose work is with the cluster, and no others."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from bridge_parts import ToyBackend, request, until

from blockroll.trainer_bridge.client import connect
from blockroll.trainer_bridge.gateway import Gateway
from blockroll.trainer_bridge.gateway.backend_driver import BackendDriver, Commit

Serve = Callable[..., Gateway]


class OneNeverEnds(ToyBackend):
    """Serves every request but `long`."""

    dispatch = "continuous"
    revoked: tuple[int, ...] = ()

    def submit(self, batch, epoch, clients=None) -> None:
        super().submit([r for r in batch if r.id != "long"], epoch, clients)

    def revoke(self, epoch: int) -> None:
        self.revoked = (*self.revoked, epoch)


def test_a_lease_is_forgotten_when_its_work_has_ended(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    backend = OneNeverEnds()
    gateway = serve(backend, lease_seconds=1.0)
    with connect(gateway.address, client_id="t") as client, caplog.at_level(logging.WARNING):
        client.submit([request("long")])
        until(lambda: gateway._driver.in_flight == 1)
        for i in range(20):
            client.generate([request(f"r{i}")], timeout=10)
        until(lambda: list(gateway._leases) == [1], 0.9)
        until(lambda: bool(backend.revoked))
        client.cancel(["long"])
    assert backend.revoked[0] == 1 and "of the leases [1]" in caplog.text


def test_a_cancellation_does_not_reach_work_that_is_leased_again() -> None:
    committing, go_on = threading.Event(), threading.Event()

    class Slow(ToyBackend):
        def commit_weights(self, version: int, arrays: Mapping[str, np.ndarray], in_flight: str = "finish") -> None:
            committing.set()
            assert go_on.wait(20)

    backend = Slow(rate=0.0)
    driver = BackendDriver(backend, lambda: None)
    try:
        asked = request("a", 4)
        driver.submit(1, [asked], ["t"])
        until(lambda: len(backend._work) == 4)
        driver.commit(Commit(1, {}, "keep", lambda: None))
        assert committing.wait(10)
        driver.cancel(["a"])
        driver.submit(2, [asked], ["t"])
        go_on.set()
        until(lambda: [work[0] for work in backend._work] == [2] * 4)
        assert driver.in_flight == 4 and driver.holds(2) and not driver.holds(1)
        backend.rate = 1e9
        until(lambda: driver.in_flight == 0)
        driver.submit(3, [asked], ["t"])
        driver.cancel(["a"])
        until(lambda: driver.in_flight == 0 and not driver.holds(3))
    finally:
        go_on.set()
        assert driver.stop(10)
