"""The number of engines that follows a queue, at a gateway without engines."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from blockroll.service import autoscaler
from blockroll.service.autoscaler import Decision, following_queue
from blockroll.service.config import Engines, ServiceConfig
from blockroll.settings import parse
from blockroll.trainer_bridge.client import connect
from blockroll.trainer_bridge.gateway import Gateway

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer_bridge"))
from bridge_parts import Endless, request, until


class Scalable(Endless):
    """Remembers how many engines it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def scale(self, engines: int) -> None:
        self.asked.append(engines)


def test_a_queue_that_a_pause_holds_starts_no_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoscaler, "LOOK_S", 0.02)
    config = parse({"policy": "tiny-reasoner", "engines": {"min": 1, "max": 4, "batch": 8, "oversubscribe": True}}, ServiceConfig,
                   "test")
    backend = Scalable()
    with (Gateway(backend, "tcp://127.0.0.1:*", tmp_path / "ledger.sqlite") as gateway,
          connect(gateway.address) as client, client.control() as control):  # fmt: skip
        control.pause("keep")
        with following_queue(config, gateway.address):
            client.submit([request("a", samples=30)])
            time.sleep(0.3)
            assert backend.asked == []
            control.resume()
            until(lambda: 4 in backend.asked)


def test_the_time_of_a_pause_is_not_idle_time() -> None:
    decision = Decision(Engines(min=1, max=8, batch=10, idle_seconds=60, oversubscribe=True))
    assert decision.engines(80, 8, now=0) == 8
    decision.restart(now=1000)  # what a pause does at every look
    assert decision.engines(0, 8, now=1002) == 8 and decision.engines(0, 8, now=1061) == 1
