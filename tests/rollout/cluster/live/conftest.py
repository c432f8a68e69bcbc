"""A pool of two real engines for all files of this folder: starting one takes seconds.

The folder is a package (`__init__.py`), so that the pool ends with its last test; ONE_PROCESS in tests/conftest.py gives one
process all of its files. Every test finds a whole pool, whatever became of the test before it: two engines serve the weights of
`policy_dir`, under a version of any number, and nothing is in flight.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
import ray
from step_gate import StepGate

import blockroll
from blockroll.rollout.cluster import EngineSpec, RayCluster
from blockroll.rollout.cluster.handle import EngineHandle
from blockroll.rollout.engine import EngineConfig

ENGINES = 2
ANSWER_S, WHOLE_S = 30.0, 120.0
"""Seconds after which an engine that does not end its work is given up, and after which the pool has to be whole."""


@pytest.fixture(scope="package")
def gate(tmp_path_factory: pytest.TempPathFactory) -> StepGate:
    """In front of the engines of the pool."""
    return StepGate(tmp_path_factory.mktemp("gate"))


@pytest.fixture(scope="package")
def pool(policy_dir: str, gate: StepGate) -> Iterator[RayCluster]:
    """A pool whose engines have the policy of `policy_dir` at first. Tests take it from `cluster`."""
    with gate.guards():
        cluster = RayCluster(EngineSpec(policy_dir, EngineConfig(max_batch=8)), engines=ENGINES)
        yield cluster
        cluster.close()


@pytest.fixture(scope="package")
def first_weights(pool: RayCluster, policy_dir: str) -> dict[str, np.ndarray]:
    """Those of `policy_dir`."""
    state = blockroll.load_policy(policy_dir).state_dict()
    return {name: state[name].numpy() for name in pool.expected_weights()}


@pytest.fixture
def cluster(pool: RayCluster, first_weights: dict[str, np.ndarray]) -> Iterator[RayCluster]:
    """The pool, which is made whole after the test. What the test has patched is as before by then."""
    version, transport = pool.version, pool._transport
    yield pool
    make_whole(pool)
    pool._transport = transport
    if pool.version != version:
        pool.commit_weights(pool.version + 1, first_weights)


def make_whole(pool: RayCluster) -> None:
    """Ends all work, and waits until ENGINES engines serve and have none."""
    start = time.monotonic()
    pool.scale(ENGINES)
    pool.cancel(list(pool._backlog.works))
    pool.hold(False)
    given_up = False
    while not (len(pool._engines) == ENGINES and all(engine.serves and is_still(engine) for engine in pool._engines)):
        waited = time.monotonic() - start
        assert waited < WHOLE_S, pool.engines()
        if waited > ANSWER_S and not given_up:
            given_up = True
            for engine in [engine for engine in pool._engines if engine.phase == "ready" and not is_still(engine)]:
                pool._lose(engine, "a test has left it with work")
        pool.poll(0.1)
    pool.poll(0.0)


def is_still(engine: EngineHandle) -> bool:
    """Whether an engine answers that it has no work."""
    try:
        return not ray.get(engine.actor.heartbeat.remote(), timeout=0.5).works
    except ray.exceptions.RayError:  # its process is stopped, or dead
        return False
