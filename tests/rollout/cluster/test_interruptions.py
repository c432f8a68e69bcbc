"""Holds, aborts and relabels of real engines: no sample is lost, no token changes."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
from cluster_parts import collect, requests

import blockroll
from blockroll.rollout.cluster import EngineSpec, RayCluster
from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.types import RolloutRequest, SamplingParams, order_by_id

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(policy_dir):
    cluster = RayCluster(EngineSpec(policy_dir, EngineConfig(max_batch=4)), engines=2)
    yield cluster
    cluster.close()


def long(name, samples=4, tokens=100):
    params = SamplingParams(sampler="coupled", max_tokens=tokens, ignore_eos=True)
    return RolloutRequest(name, (4, 5), params, seed=3, samples=samples)


def steps(cluster):
    """Passes of all engines so far, once their heartbeats are two beats old."""
    end = time.monotonic() + 2.2
    while time.monotonic() < end:
        assert cluster.poll(0.1) == []
    return [engine.figures["forwards"] for engine in cluster.engines()]


def test_a_held_pool_makes_no_step_and_goes_on_with_the_same_tokens(cluster, policy_dir):
    batch = [long("a", 6), *requests("b", 4, tokens=40)]
    cluster.submit(batch, epoch=1)
    done = collect(cluster, 1)
    cluster.hold(True)
    done += cluster.poll(0.5)
    cluster.submit([long("later", 1, 5)], epoch=2)
    before = steps(cluster)
    assert steps(cluster) == before and len(done) < 14
    cluster.label_version(4)
    cluster.hold(False)
    done += collect(cluster, 15 - len(done))
    expected = Engine(blockroll.load_policy(policy_dir), EngineConfig(max_batch=4)).rollout([*batch, long("later", 1, 5)])
    got = order_by_id([c.trajectory for c in done])
    assert [t.tokens for t in got] == [t.tokens for t in order_by_id(expected)]
    assert set(np.concatenate([t.versions for t in got])) == {0, 4} and got[-1].versions.tolist() == [4] * 5
    assert [engine.version for engine in cluster.engines()] == [4, 4] and cluster.restarts == 0


@pytest.mark.parametrize("kill", [False, True])
def test_an_aborted_request_comes_back_with_what_it_has(cluster, policy_dir, kill):
    restarts, name = cluster.restarts, f"abort{kill}"
    cluster.submit([long(name, 40), *requests(f"other{kill}", 2, tokens=10)], epoch=5 + kill)
    done = collect(cluster, 2)
    if kill:
        cluster.hold(True)
        os.kill(cluster.engines()[0].pid, signal.SIGKILL)
    cluster.abort([name, "unknown"])
    cluster.hold(False)
    done += collect(cluster, 44 - len(done))
    found = [c.trajectory for c in done if c.request_id == name]
    assert len({t.sample for t in found}) == len(found) == 40
    whole = {t.sample: t.tokens for t in Engine(blockroll.load_policy(policy_dir), EngineConfig()).rollout([long(name, 40)])}
    assert all(whole[t.sample][: len(t.tokens)] == t.tokens and len(t.tokens) == len(t.versions) for t in found)
    assert any(t.finish_reason == "abort" and t.tokens for t in found) and any(not t.tokens for t in found)
    assert {c.trajectory.finish_reason for c in done if c.request_id != name} == {"length"}
    assert cluster.poll(0.2) == [] and cluster.restarts == restarts + kill


def test_an_engine_that_starts_after_a_label_has_it(cluster):
    cluster.label_version(7)
    os.kill(cluster.engines()[1].pid, signal.SIGKILL)
    cluster.submit(requests("after", 4, tokens=5), epoch=9)
    assert {version for c in collect(cluster, 8) for version in c.trajectory.versions} == {7}
    end = time.monotonic() + 60
    while [engine.state for engine in cluster.engines()] != ["idle", "idle"]:
        assert time.monotonic() < end
        cluster.poll(0.1)
    assert [engine.version for engine in cluster.engines()] == [7, 7]
    cluster.reset_prefix_cache()
    cluster.abort()
