"""How many engines there are: real engine handles whose processes are not there."""

from __future__ import annotations

import pytest
import ray

from blockroll.rollout.cluster.fleet import Fleet
from blockroll.rollout.cluster.handle import EngineHandle
from blockroll.rollout.cluster.spec import EngineSpec


@pytest.fixture
def killed(monkeypatch):
    """The processes that were ended, in order."""
    killed = []
    monkeypatch.setattr(ray, "kill", killed.append)
    return killed


def ready(engine, process):
    engine.phase, engine.actor = "ready", process


def test_an_idle_engine_leaves_when_the_commit_under_way_has_ended(killed):
    fleet = Fleet(EngineSpec("none"), 2, 600.0, 6.0)
    fleet.engines += [EngineHandle(i, EngineSpec("none"), 600.0, 6.0) for i in range(2)]
    for engine in fleet.engines:
        ready(engine, f"process {engine.id}")
    fleet.wanted = 1
    fleet.look(0.0, 0, None, hold=True)
    assert [engine.draining for engine in fleet.engines] == [False, True] and not killed
    fleet.look(0.0, 1, None, hold=False)
    assert [engine.id for engine in fleet.engines] == [0] and killed == ["process 1"]


def test_a_lost_engine_that_leaves_is_not_started_again_during_a_commit(killed):
    fleet = Fleet(EngineSpec("none"), 1, 600.0, 6.0)
    fleet.engines += [EngineHandle(i, EngineSpec("none"), 600.0, 6.0) for i in range(2)]
    ready(fleet.engines[0], "process 0")
    fleet.look(0.0, 0, None, hold=True)
    assert [engine.phase for engine in fleet.engines] == ["ready", "lost"]
    assert fleet.engines[1].draining and fleet.engines[1].actor is None


def test_an_engine_that_was_stopped_is_not_ready(killed):
    engine = EngineHandle(0, EngineSpec("none"), 600.0, 6.0)
    ready(engine, "process")
    engine.stop()
    assert (engine.phase, engine.serves, killed) == ("lost", False, ["process"])
