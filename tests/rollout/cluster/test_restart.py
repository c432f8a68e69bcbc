"""A whole service, killed and started again on the same ledger: real engines, real Ray, real sockets."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

import blockroll
from blockroll.model.scoring import score
from blockroll.rollout.types import RolloutRequest, SamplingParams
from blockroll.trainer_bridge.client import connect

SERVICE = """
import sys
from blockroll.rollout.cluster import EngineSpec, RayCluster
from blockroll.rollout.engine import EngineConfig
from blockroll.trainer_bridge.gateway import Gateway
cluster = RayCluster(EngineSpec(sys.argv[1], EngineConfig(max_batch=8)), engines=1)
with Gateway(cluster, sys.argv[2], sys.argv[3]) as gateway:
    print("serving", flush=True)
    gateway.wait()
cluster.close()
"""


def start(*arguments):
    process = subprocess.Popen([sys.executable, "-c", SERVICE, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline()
    return process


def requests(prefix, count):
    params = SamplingParams(sampler="coupled", max_tokens=100, ignore_eos=True)
    return [RolloutRequest(f"{prefix}{i:02d}", (1, 5 + i, 9), params, seed=i, samples=2) for i in range(count)]


def largest_error(policy, trajectories):
    scores = score(policy, [(t.prompt_tokens, t.tokens) for t in trajectories])
    return max(np.abs(s - t.logprobs).max() for s, t in zip(scores, trajectories))


@pytest.mark.slow  # a service is brought up twice
def test_a_killed_service_serves_the_version_it_had(policy_dir, tmp_path):
    policy = blockroll.load_policy(policy_dir)
    state = {name: tensor * 1.25 for name, tensor in policy.state_dict().items()}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    service = start(policy_dir, address, str(tmp_path / "ledger"))
    try:
        with connect(address, client_id="t", timeout=120) as client:
            assert client.push_weights(1, state) == 1
            client.submit(requests("left", 40))
            results = client.results(timeout=60)
            got = [next(results) for _ in range(3)]
            service.send_signal(signal.SIGKILL)
            service.wait()
            service = start(policy_dir, address, str(tmp_path / "ledger"))
            got += list(results)
            assert len({t.key for t in got}) == 80
            assert {int(v) for t in got for v in t.versions} == {1}
            with torch.no_grad():
                policy.load_state_dict(state)
            assert largest_error(policy, got) < 1e-4
            assert client.push_weights(2, {name: tensor * 0.8 for name, tensor in state.items()}) == 2
            assert {int(v) for t in client.generate(requests("new", 2), timeout=60) for v in t.versions} == {2}
            client.shutdown_gateway()
        assert service.wait(60) == 0
    finally:
        service.kill()
