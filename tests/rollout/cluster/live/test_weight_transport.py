"""Weight versions through each transport: the same tokens, all engines or none, and only what has changed."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time

import numpy as np
import pytest

import blockroll
from blockroll.errors import ClusterError, TransportError
from blockroll.rollout.cluster.shared_weights import SharedMemoryTransport
from blockroll.rollout.cluster.transports import transport_of
from blockroll.rollout.cluster.weight_transport import TRANSPORTS
from blockroll.rollout.types import RolloutRequest, SamplingParams
from blockroll.trainer_bridge.client import connect
from blockroll.trainer_bridge.client.host_weights import HostWeights
from blockroll.trainer_bridge.gateway import Gateway

QUICK_LAST = [pytest.param(name, marks=[pytest.mark.slow] * (name != "torch_distributed")) for name in TRANSPORTS]
"""A killed engine's next process takes seconds, so one of the transports stands for the others: the one that has to notice."""


@pytest.fixture(params=TRANSPORTS)
def cluster(cluster, request):
    """The pool of all tests, by this transport."""
    cluster._transport = transport_of(request.param, 60.0)
    return cluster


@pytest.fixture(scope="module")
def arrays(policy_dir):
    state = blockroll.load_policy(policy_dir).state_dict()
    del state["lm_head.weight"]  # tied to the embedding
    return {name: tensor.numpy().copy() for name, tensor in state.items()}


def settle(cluster, seconds=90.0):
    end = time.monotonic() + seconds
    while [engine.phase for engine in cluster._engines] != ["ready"] * 2:
        assert time.monotonic() < end, cluster.engines()
        cluster.poll(0.1)


def serve(cluster, name, version, count=4, seconds=60.0):
    """Tokens and log-probabilities by sample; every token is of the version, and every engine serves it."""
    params = SamplingParams(sampler="coupled", max_tokens=12, ignore_eos=True)
    requests = [RolloutRequest(f"{name}-{version}-{i}", (1, 5 + i, 9), params, seed=i, samples=2) for i in range(count)]
    cluster.submit(requests, epoch=version + 100)
    done, end = [], time.monotonic() + seconds
    while len(done) < 2 * count:
        assert time.monotonic() < end
        done += [item.trajectory for item in cluster.poll(0.2)]
    assert {int(v) for t in done for v in t.versions} == {version}
    assert {engine.version for engine in cluster.engines() if engine.state in ("idle", "busy")} == {version}
    return {(t.request_id.rpartition("-")[2], t.sample): (t.tokens, t.logprobs.tobytes()) for t in done}


_seen: dict[str, object] = {}


def test_the_transports_give_the_same_tokens_and_only_what_has_changed_travels(cluster, arrays):
    version = cluster.version + 1
    first = {name: array * np.float32(1.25) for name, array in arrays.items()}
    cluster.commit_weights(version, first)
    whole = serve(cluster, "whole", version)
    changed = {"model.norm.weight", "model.embed_tokens.weight"}
    second = {name: array * np.float32(0.5) if name in changed else np.full_like(array, np.nan) for name, array in first.items()}
    cluster.commit_weights(version + 1, second, changed=changed)  # what has not changed is not looked at
    delta = serve(cluster, "delta", version + 1)
    cluster.commit_weights(version + 2, second, changed=())
    assert serve(cluster, "none", version + 2) == delta
    truth = {name: second[name] if name in changed else array for name, array in first.items()}
    cluster.commit_weights(version + 3, truth)
    assert serve(cluster, "truth", version + 3) == delta != whole
    assert _seen.setdefault("whole", whole) == whole
    assert _seen.setdefault("delta", delta) == delta


def test_a_version_that_an_engine_refuses_leaves_the_old_one(cluster, arrays):
    version = cluster.version + 1
    cluster.commit_weights(version, arrays)
    before = serve(cluster, "before", version)
    for wrong in ({"model.norm.weight": np.zeros(3, np.float32)}, {"model.norm.weight": arrays["model.norm.weight"] * np.nan}):
        with pytest.raises(ClusterError, match="the old one serves"):
            cluster.commit_weights(version + 1, {**arrays, **wrong})
    with pytest.raises(ClusterError, match="lacks 1 of"):
        cluster.commit_weights(version + 1, {name: array for name, array in arrays.items() if name != "model.norm.weight"})
    assert cluster.version == version
    assert serve(cluster, "after", version) == before


@pytest.mark.parametrize("how", ["a digest that does not match", "half sent"])
def test_a_push_that_comes_to_nothing_leaves_the_old_version(cluster, arrays, tmp_path, monkeypatch, how):
    version = cluster.version + 1
    cluster.commit_weights(version, arrays)
    truth = serve(cluster, "truth", version)
    chunks = HostWeights.chunks

    def spoiled(self, *arguments, **options):
        for place, (index, offset, data) in enumerate(chunks(self, *arguments, **options)):
            if place == 3 and how == "half sent":
                raise KeyboardInterrupt
            yield index, offset, bytes([*data[:-1], data[-1] ^ 1]) if place == 3 else data

    with Gateway(cluster, "tcp://127.0.0.1:*", tmp_path / "ledger") as gateway, connect(gateway.address) as client:
        changed = {name: array * np.float32(1.5) for name, array in arrays.items()}
        with monkeypatch.context() as patch:
            patch.setattr(HostWeights, "chunks", spoiled)
            with pytest.raises(KeyboardInterrupt if how == "half sent" else TransportError):
                client.push_weights(version + 1, changed)
        assert cluster.version == version
        assert client.push_weights(version + 1, arrays, in_flight="keep") == version + 1
    assert serve(cluster, "after", version + 1) == truth


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is killed")
def test_shared_memory_is_gone_when_its_process_is_killed():
    before, (reading, writing) = set(os.listdir("/dev/shm")), os.pipe()
    child = os.fork()
    if not child:
        transport = SharedMemoryTransport()
        transport.stage({"a": np.arange(1000), "b": np.float32(3)[None]}, {"a", "b"})
        tickets = transport.tickets(2)
        os.write(writing, pickle.dumps(tickets[0]))
        time.sleep(60)
        os._exit(1)
    ticket = pickle.loads(os.read(reading, 1 << 16))
    found = ticket.read()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert np.array_equal(found["a"], np.arange(1000)) and found["b"] == 3  # for as long as somebody maps it
    with pytest.raises(ClusterError, match="reaches no engine on another host"):
        ticket.read()
    assert set(os.listdir("/dev/shm")) <= before | {name for name in os.listdir("/dev/shm") if "blockroll" not in name}
    os.close(reading), os.close(writing)


def test_shared_memory_is_not_copied_where_it_was_received_and_not_kept_for_a_few_tensors():
    transport = SharedMemoryTransport()
    room = transport.room({name: ("float32", (1000,)) for name in "abcd"})
    for name, array in room.items():
        array[:] = ord(name)
    transport.stage(room, set(room))
    transport.settle(True)
    assert all(np.shares_memory(transport._serving[name], room[name]) for name in room)
    transport.stage({**room, "a": np.ones(1000, np.float32)}, {"a"})
    transport.settle(True)
    assert np.shares_memory(transport._serving["b"], room["b"])
    transport.stage({**room, **{name: np.ones(1000, np.float32) for name in "bc"}}, {"b", "c"})
    transport.settle(True)
    assert not np.shares_memory(transport._serving["d"], room["d"])
    assert {name: array[0] for name, array in transport.serving.read().items()} == {"a": 1, "b": 1, "c": 1, "d": ord("d")}


@pytest.mark.parametrize("cluster", QUICK_LAST, indirect=True)
def test_an_engine_killed_while_it_stages(cluster, arrays):
    """The others take the version, and so does its next process."""
    version = cluster.version + 1
    first = {name: array * np.float32(1.5) for name, array in arrays.items()}
    cluster.commit_weights(version, first)
    truth = serve(cluster, "truth", version)
    settle(cluster)
    victim = cluster._engines[0]
    os.kill(victim.home.pid, signal.SIGSTOP)
    killer = threading.Timer(0.7, os.kill, (victim.home.pid, signal.SIGKILL))
    killer.start()
    begin = time.monotonic()
    cluster.commit_weights(version + 1, first)
    assert time.monotonic() - begin < 15
    killer.join()
    assert cluster.version == version + 1
    assert serve(cluster, "others", version + 1, count=4) == truth
    settle(cluster)
    assert serve(cluster, "both", version + 1) == truth
