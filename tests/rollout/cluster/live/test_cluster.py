"""Real Ray actors around real engines."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch
from cluster_parts import collect, collect_until, requests, until

import blockroll
from blockroll.errors import ClusterError, InvalidInput
from blockroll.model.scoring import score
from blockroll.rollout.cluster import fleet
from blockroll.rollout.cluster.handle import EngineHandle
from blockroll.rollout.cluster.weight_commit import WeightCommit
from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.types import RolloutRequest, SamplingParams, order_by_id
from blockroll.trainer_bridge.client import connect
from blockroll.trainer_bridge.gateway import Gateway
from blockroll.trainer_bridge.wire.records import decode_trajectory, encode_trajectory


class Stubborn:
    """An actor that fails when it is to take a version: asked for one it was never given, it raises."""

    def __init__(self, actor):
        self._actor = actor
        self.commit = SimpleNamespace(remote=lambda version, how: actor.commit.remote(version + 1000, how))

    def __getattr__(self, name):
        return getattr(self._actor, name)


@pytest.fixture
def stubborn(cluster, monkeypatch):
    """Makes the actor of an engine stubborn, for as long as the engine has it and the test lasts."""
    stop = EngineHandle.stop

    def unwrap(engine):
        if isinstance(engine.actor, Stubborn):
            engine.actor = engine.actor._actor

    def wrap(engine):
        engine.actor = Stubborn(engine.actor)

    monkeypatch.setattr(EngineHandle, "stop", lambda engine: (unwrap(engine), stop(engine)))
    yield wrap
    for engine in cluster._engines:
        unwrap(engine)


def test_same_as_one_engine(cluster, policy_dir):
    batch = requests("a")
    cluster.submit(batch, epoch=1)
    done = collect(cluster, 20)
    expected = Engine(blockroll.load_policy(policy_dir), EngineConfig(max_batch=8)).rollout(batch)
    got = order_by_id([c.trajectory for c in done])
    assert [t.tokens for t in got] == [t.tokens for t in order_by_id(expected)]
    assert {c.epoch for c in done} == {1}


def test_refused_request_is_reported_and_others_go_on(cluster):
    bad = RolloutRequest("bad", tuple(range(4, 40)) * 10)
    cluster.submit([*requests("b", 2), bad], epoch=2)
    done = collect(cluster, 5)
    assert next(c.error for c in done if c.request_id == "bad").startswith("prompt_tokens")
    assert sum(c.trajectory is not None for c in done) == 4


def test_requests_of_weights_that_overflow_fail_by_name(cluster, policy_dir):
    """A version of finite numbers whose logits overflow: no trajectory comes, each request fails, and a later version serves."""
    good = {name: tensor.numpy() for name, tensor in blockroll.load_policy(policy_dir).state_dict().items()}
    good.pop("lm_head.weight")
    norm, embedding, version = "model.norm.weight", "model.embed_tokens.weight", cluster.version
    bad = good | {norm: np.full_like(good[norm], 3e38), embedding: good[embedding] * 1e3}
    cluster.commit_weights(version + 1, bad)
    cluster.submit(requests("overflow", 4), epoch=5)
    failed = [completed for completed in collect(cluster, 4) if completed.trajectory is None]
    assert {completed.request_id for completed in failed} == {f"overflow{i:02d}" for i in range(4)}
    assert all(completed.error.startswith("logprobs: ") for completed in failed)
    cluster.commit_weights(version + 2, good)
    cluster.submit(requests("after-overflow", 2), epoch=6)
    assert all(completed.trajectory is not None for completed in collect(cluster, 4))


def test_a_cancelled_request_ends_and_may_come_again(cluster):
    long = [RolloutRequest(f"cancel-{i}", (4, 5), SamplingParams(max_tokens=400, ignore_eos=True), samples=8) for i in range(4)]
    cluster.submit([*long, *requests("cancel-not", 2)], epoch=4)
    cluster.cancel([request.id for request in long])
    assert {c.request_id for c in collect(cluster, 4)} == {"cancel-not00", "cancel-not01"}
    cluster.submit([RolloutRequest(long[0].id, (4, 5), SamplingParams(max_tokens=3), samples=2)], epoch=5)
    assert {(c.epoch, c.request_id) for c in collect(cluster, 2)} == {(5, long[0].id)}
    assert cluster.poll(0.3) == []


def test_only_what_a_killed_engine_left_unfinished_is_done_again(cluster, gate, policy_dir, caplog):
    before, batch = cluster.restarts, requests("c", 40, tokens=100)
    with gate.closed(1, ended=4) as waiting:
        cluster.submit(batch, epoch=3)
        done = collect_until(cluster, lambda: waiting() == 2)
        victim = cluster.engines()[0]
        held = len(cluster._engines[0].samples)
        os.kill(victim.pid, signal.SIGKILL)
    done += collect(cluster, 80 - len(done))
    assert cluster.restarts == before + 1
    assert [r.getMessage().partition(":")[0] for r in caplog.records if r.name == "blockroll.rollout.cluster"] == [
        f"engine {victim.id} is replaced"]
    assert cluster.poll(0.2) == []
    got = order_by_id([c.trajectory for c in done])
    expected = Engine(blockroll.load_policy(policy_dir), EngineConfig(max_batch=8)).rollout(batch)
    assert held > 0
    assert [t.key for t in got] == [t.key for t in expected]
    assert [t.tokens for t in got] == [t.tokens for t in expected]
    settle(cluster)
    assert cluster.engines()[0].pid != victim.pid


def test_weights_are_taken_by_all_or_none(cluster, policy_dir):
    state = blockroll.load_policy(policy_dir).state_dict()
    arrays = {name: state[name].numpy() * 1.5 for name in cluster.expected_weights()}
    broken = {**arrays, "model.norm.weight": np.zeros(3, dtype=np.float32)}
    version = cluster.version
    with pytest.raises(ClusterError, match="refused"):
        cluster.commit_weights(version + 1, broken)
    assert cluster.version == version
    cluster.commit_weights(version + 1, arrays)
    cluster.submit(requests("d", 2), epoch=5)
    assert {int(v) for c in collect(cluster, 4) for v in c.trajectory.versions} == {version + 1}


def settle(cluster, seconds=90.0):
    """Waits until every engine serves."""
    end = time.monotonic() + seconds
    while [engine.phase for engine in cluster._engines] != ["ready"] * 2:
        assert time.monotonic() < end, cluster.engines()
        assert cluster.poll(0.1) == []


def pids(cluster):
    return [engine.pid for engine in cluster.engines()]


def test_an_engine_that_fails_over_a_version_is_replaced_by_one_that_has_it(cluster, next_weights, stubborn):
    arrays, policy = next_weights
    old, before = cluster.version, pids(cluster)
    stubborn(cluster._engines[1])
    cluster.submit(requests("s", 20, tokens=100), epoch=20)
    done = collect(cluster, 4)
    cluster.commit_weights(old + 1, arrays, in_flight="keep")
    done += collect(cluster, 40 - len(done))
    assert cluster.version == old + 1
    settle(cluster)
    assert (pids(cluster)[0] == before[0], pids(cluster)[1] == before[1]) == (True, False)
    assert [engine.version for engine in cluster.engines()] == [old + 1, old + 1]
    assert len({c.trajectory.key for c in done}) == 40
    cluster.submit(requests("t", 4), epoch=21)
    got = [c.trajectory for c in collect(cluster, 8)]
    assert {int(v) for t in got for v in t.versions} == {old + 1}
    assert largest_error(policy, got, old + 1) < 1e-4


def test_an_engine_that_dies_after_it_took_a_version_is_given_it_again(cluster, next_weights, monkeypatch):
    """It dies, and its next process has loaded the old version, while the commit waits for the others."""
    take, engine, version = WeightCommit.take, cluster._engines[0], cluster.version + 1

    def dies_afterwards(commit, *how):
        errors = take(commit, *how)
        cluster._lose(engine, "it died")
        while not engine.loaded:
            cluster._pump(0.1)
        assert engine.version == version - 1
        return errors

    monkeypatch.setattr(WeightCommit, "take", dies_afterwards)
    cluster.commit_weights(version, next_weights[0], "keep")
    settle(cluster)
    assert [status.version for status in cluster.engines()] == [version, version]
    assert [beat.version for beat in ray.get([e.actor.heartbeat.remote() for e in cluster._engines])] == [version, version]


def test_where_every_engine_fails_over_a_version_the_old_one_serves_on_all(cluster, next_weights, stubborn, tmp_path):
    with Gateway(cluster, "tcp://127.0.0.1:*", tmp_path / "ledger") as gateway, connect(gateway.address) as client:
        old = client.version
        for engine in cluster._engines:
            stubborn(engine)
        with pytest.raises(ClusterError, match=f"no engine could take version {old + 1}"):
            client.push_weights(old + 1, next_weights[0])
        assert [engine.version for engine in cluster.engines()] == [old, old]
        assert {int(v) for t in client.generate(requests("u", 4), timeout=60) for v in t.versions} == {old}
        assert client.push_weights(old + 1, next_weights[0]) == old + 1


def test_a_cluster_that_starts_elsewhere_is_brought_to_the_version_of_the_ledger(cluster, next_weights, tmp_path):
    arrays, policy = next_weights
    first, version = {name: array * np.float32(0.5) for name, array in arrays.items()}, cluster.version + 1
    with Gateway(cluster, "tcp://127.0.0.1:*", tmp_path / "ledger") as gateway:
        with connect(gateway.address, client_id="t") as client:
            client.push_weights(version, arrays)
            client.submit(requests("left", 4))
    cluster.revoke(1)
    cluster.commit_weights(version - 1, first)
    with Gateway(cluster, "tcp://127.0.0.1:*", tmp_path / "ledger") as gateway:
        with connect(gateway.address, client_id="t") as client:
            got = client.generate(requests("left", 4), timeout=60)
            assert {int(v) for t in got for v in t.versions} == {version}
            assert largest_error(policy, got) < 1e-4
            ray.kill(cluster._engines[0].actor)
            got = client.generate(requests("more", 4), timeout=60)
            assert largest_error(policy, got) < 1e-4


def test_a_hung_engines_work_goes_to_one_that_answers(cluster, gate, tmp_path, monkeypatch):
    """Stopped, not dead: nothing but silence tells."""
    for engine in cluster._engines:
        monkeypatch.setattr(engine, "_silence_s", 3.0)
    with Gateway(cluster, "tcp://127.0.0.1:*", tmp_path / "ledger", max_in_flight=80) as gateway:
        with connect(gateway.address) as client:
            results, pid = client.results(timeout=60), pids(cluster)[1]
            with gate.closed(1, ended=4) as waiting:
                client.submit(requests("hung", 40, tokens=100))
                got = [next(results) for _ in range(8)]
                until(lambda: waiting() == 2)
                os.kill(pid, signal.SIGSTOP)
            got += list(results)
            assert len({t.key for t in got}) == len(got) == 80
            assert pid not in pids(cluster)
            assert client.status()["missing"] == 0


def test_a_short_request_of_a_second_client_is_served_at_once(cluster, tmp_path):
    with Gateway(cluster, "tcp://127.0.0.1:*", tmp_path / "ledger") as gateway:
        with connect(gateway.address, client_id="first") as first, connect(gateway.address, client_id="second") as second:
            first.submit(requests("long", 100, tokens=120, samples=8))
            stream = first.results(timeout=120)
            next(stream)
            second.generate([RolloutRequest("short", (1, 2), SamplingParams(max_tokens=1))], timeout=60)
            assert first.status()["unique"] < 700
            first.cancel([f"long{i:02d}" for i in range(100)])
    assert not cluster._backlog.works


def test_engines_are_added_where_ray_has_a_place_and_leave_when_they_have_ended_their_work(cluster, caplog, monkeypatch):
    monkeypatch.setattr(fleet, "PLACING_S", 0.5)
    cluster.scale(3)
    start = time.monotonic()
    while cluster.engines()[-1].state != "waiting":
        cluster.poll(0.1)
        assert time.monotonic() - start < 10.0, cluster.engines()
    assert cluster.engines()[-1].reason == "Ray has no place for it: 0 of 2 CPU are free and it needs 1"
    batch = requests("w", 40, tokens=100)
    cluster.submit(batch, epoch=40)
    done = collect(cluster, 4)
    cluster.scale(1)
    done += cluster.poll(0.0)
    while len(cluster.engines()) > 1:
        done += cluster.poll(0.1)
        assert [engine.state for engine in cluster.engines()].count("draining") <= 1
    done += collect(cluster, 80 - len(done))
    assert sorted(c.trajectory.key for c in done) == [(request.id, i) for request in batch for i in range(2)]
    assert not caplog.records


@pytest.mark.parametrize(("change", "what"), [
    (lambda a: a.pop("model.norm.weight"), "lacks 1 of the policy's tensors, first 'model.norm.weight'"),
    (lambda a: a.update(extra=a["model.norm.weight"]), "has 1 tensor that the policy has not, first 'extra'"),
    (lambda a: a.update({"model.norm.weight": a["model.norm.weight"] * np.nan}), "version .* holds NaN or infinity"),
    (lambda a: a.update({"model.norm.weight": a["model.norm.weight"][1:]}), "model.norm.weight in version .* has shape")],
    ids=["missing", "unknown", "not finite", "another shape"])
def test_a_version_that_is_not_the_policys_is_refused_before_any_engine_takes_it(cluster, next_weights, change, what):
    arrays, version, before = dict(next_weights[0]), cluster.version, pids(cluster)
    change(arrays)
    with pytest.raises(ClusterError, match=what):
        cluster.commit_weights(version + 1, arrays)
    assert (cluster.version, pids(cluster)) == (version, before)


@pytest.fixture
def next_weights(cluster, policy_dir):
    """Arrays of the version after the one that serves, and the policy that has them."""
    policy = blockroll.load_policy(policy_dir)
    arrays = {name: policy.state_dict()[name].numpy() * np.float32(1.5) for name in cluster.expected_weights()}
    policy.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()}, strict=False)
    return arrays, policy


def commit_under_way(cluster, gate, arrays, epoch, in_flight):
    """Samples of a batch in the middle of which the next version is committed, in the order of their ids."""
    batch = requests(f"{in_flight}-", 40, tokens=100, samples=3)
    with gate.closed(4, ended=4) as waiting:
        cluster.submit(batch, epoch)
        done = collect_until(cluster, lambda: waiting() == 2)
        if in_flight != "finish":
            cluster.commit_weights(cluster.version + 1, arrays, in_flight=in_flight)
    if in_flight == "finish":
        cluster.commit_weights(cluster.version + 1, arrays, in_flight=in_flight)
    done += collect(cluster, 120 - len(done))
    got = order_by_id([c.trajectory for c in done])
    assert [t.key for t in got] == [(r.id, i) for r in batch for i in range(3)]
    assert {c.epoch for c in done} == {epoch}
    return got


def across(trajectories):
    return [t for t in trajectories if len(set(t.versions.tolist())) == 2]


def largest_error(policy, trajectories, version=None):
    """Between the recorded logprobs of a version's tokens, or all, and those of `policy`."""
    scores = score(policy, [(t.prompt_tokens, t.tokens) for t in trajectories])
    return max(np.abs(s - t.logprobs)[(t.versions == version) | (version is None)].max()
               for s, t in zip(scores, trajectories))


def test_finish_waits_for_every_sample(cluster, gate, next_weights):
    old = cluster.version
    got = commit_under_way(cluster, gate, next_weights[0], 6, "finish")
    assert {int(v) for t in got for v in t.versions} == {old}
    assert cluster.version == old + 1


def test_keep_goes_on_over_the_old_keys_and_recompute_over_new_ones(cluster, gate, next_weights):
    arrays, policy = next_weights
    version = cluster.version + 1
    errors = {}
    for epoch, how in enumerate(("keep", "recompute"), start=7):
        mixed = across(commit_under_way(cluster, gate, arrays, epoch, how))
        assert mixed
        assert all((np.diff(t.versions) >= 0).all() and len(t.tokens) == 100 for t in mixed)
        errors[how] = largest_error(policy, mixed, cluster.version)
        if how == "keep":
            # Back to where it was, so that `recompute` meets the same change of weights.
            cluster.commit_weights(version + 1, {name: array * 0.5 for name, array in arrays.items()})
    assert errors["recompute"] < 1e-4 < errors["keep"]


def test_abort_ends_what_has_begun(cluster, gate, next_weights):
    old = cluster.version
    got = commit_under_way(cluster, gate, next_weights[0], 9, "abort")
    ended = [t for t in got if t.finish_reason == "abort"]
    assert ended
    assert all(0 < len(t.tokens) < 100 and {*t.versions.tolist()} == {old} for t in ended)
    assert {t.finish_reason for t in got} == {"abort", "length"}
    assert [len(t.logprobs) for t in got] == [len(t.tokens) for t in got]
    for trajectory in ended:
        decode_trajectory(encode_trajectory(trajectory))


def test_a_client_chooses_what_happens_in_flight(cluster, gate, next_weights, tmp_path):
    old = cluster.version
    with Gateway(cluster, "tcp://127.0.0.1:*", tmp_path / "ledger") as gateway, connect(gateway.address) as client:
        results = client.results(timeout=60)
        with gate.closed(4, ended=4) as waiting:
            client.submit(requests("bridge", 40, tokens=100, samples=4))
            got = [next(results) for _ in range(8)]
            until(lambda: waiting() == 2)
            assert client.push_weights(old + 1, next_weights[0], in_flight="keep", allow_gap=True) == old + 1
        got += list(client.results(timeout=60))
        with pytest.raises(InvalidInput, match=r"in_flight: unknown policy .*'later'.*finish, keep, recompute, abort"):
            client.push_weights(old + 2, next_weights[0], in_flight="later")
        assert client.delivery == {"requested": 160, "unique": 160, "duplicates": 0, "failed": 0, "missing": 0}
    assert across(got)
    assert {int(v) for t in got for v in t.versions} == {old, old + 1}


def test_a_batch_submitted_before_a_push_is_collected_after_it(cluster, gate, next_weights, tmp_path):
    """One step off policy: engines decode while the trainer trains, without a word between them, and take its push in mid-way."""
    old, batch = cluster.version, requests("next", 40, tokens=100, samples=4)
    with Gateway(cluster, "tcp://127.0.0.1:*", tmp_path / "ledger") as gateway, connect(gateway.address, ack="manual") as client:
        with gate.closed(4, ended=4) as waiting:
            client.submit(batch)
            until(lambda: gateway._ledger.counters.unique >= 8 and waiting() == 2)
            assert client.push_weights(old + 1, next_weights[0], in_flight="keep", allow_gap=True) == old + 1
        got = client.generate(batch, timeout=60)
        assert [t.key for t in got] == [(r.id, i) for r in batch for i in range(4)]
        assert across(got)
        assert all((np.diff(t.versions) >= 0).all() and {*t.versions.tolist()} <= {old, old + 1} for t in got)
        client.acknowledge(got)
        assert client.status()["acknowledged"] == 160
