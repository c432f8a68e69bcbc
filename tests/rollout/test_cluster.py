"""Real Ray actors around real engines."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import psutil
import pytest
import torch
from transformers import ZayaConfig

import blockroll
from blockroll.errors import ClusterError
from blockroll.model.policy import Policy
from blockroll.rollout.cluster import RayCluster
from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.types import RolloutRequest, SamplingParams, order_by_id


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory):
    config = ZayaConfig(
        vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        moe_intermediate_size=24, num_experts=3, router_hidden_size=8, max_position_embeddings=128, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config.diffusion = {"block_size": 8, "mask_token_id": 3}
    policy = Policy(config).initialise(torch.Generator().manual_seed(0))
    return str(blockroll.save_policy(policy, tmp_path_factory.mktemp("policies") / "random"))


@pytest.fixture(scope="module")
def cluster(policy_dir):
    cluster = RayCluster(policy_dir, EngineConfig(max_batch=8), actors=2)
    yield cluster
    cluster.close()


def requests(prefix, count=10, tokens=24):
    params = SamplingParams(sampler="coupled", max_tokens=tokens, ignore_eos=True)
    return [RolloutRequest(f"{prefix}{i:02d}", (1, 5 + i, 9), params, seed=i, samples=2) for i in range(count)]


def collect(cluster, count, seconds=120.0):
    done, end = [], time.monotonic() + seconds
    while len(done) < count:
        assert time.monotonic() < end, f"{len(done)} of {count} came"
        done += cluster.poll(0.5)
    return done


def test_same_as_one_engine(cluster, policy_dir):
    batch = requests("a")
    cluster.submit(batch, epoch=1)
    done = collect(cluster, 20)
    expected = Engine(blockroll.load_policy(policy_dir), EngineConfig(max_batch=8)).generate(batch)
    got = order_by_id([c.trajectory for c in done])
    assert [t.tokens for t in got] == [t.tokens for t in order_by_id(expected)]
    assert {c.epoch for c in done} == {1}


def test_refused_request_is_reported_and_others_go_on(cluster):
    bad = RolloutRequest("bad", tuple(range(4, 40)) * 10)
    cluster.submit([*requests("b", 2), bad], epoch=2)
    done = collect(cluster, 5)
    assert next(c.error for c in done if c.request_id == "bad").startswith("prompt_tokens")
    assert sum(c.trajectory is not None for c in done) == 4


def test_work_of_a_killed_actor_is_done_again(cluster):
    before = cluster.restarts
    cluster.submit(requests("c", 12, tokens=100), epoch=3)
    os.kill(_actor_processes()[0], signal.SIGKILL)
    done = collect(cluster, 24)
    assert len({c.trajectory.key for c in done}) == 24
    assert cluster.restarts == before + 1


def test_weights_are_taken_by_all_or_none(cluster, policy_dir):
    state = blockroll.load_policy(policy_dir).state_dict()
    arrays = {name: state[name].numpy() * 1.5 for name in cluster.expected_weights()}
    broken = {**arrays, "model.norm.weight": np.zeros(3, dtype=np.float32)}
    version = cluster.version
    with pytest.raises(ClusterError, match="refused"):
        cluster.commit_weights(version + 1, broken)
    assert cluster.version == version
    cluster.commit_weights(version + 1, arrays)
    cluster.submit(requests("d", 2), epoch=4)
    assert {int(v) for c in collect(cluster, 4) for v in c.trajectory.versions} == {version + 1}


def _actor_processes():
    return [p.pid for p in psutil.Process().children(recursive=True) if "ray::RolloutActor" in " ".join(p.cmdline())]
