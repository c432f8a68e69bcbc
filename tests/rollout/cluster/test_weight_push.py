"""A push of 2 GB to four engines: how long it takes beside plain copies, and that the engines decode meanwhile.

Plain copies of the same bytes are these, one after the other, by one thread, into memory that was not touched before: client to
gateway, gateway to a file that is synced, gateway to shared memory (Ray's object store), and one copy for each of the engines.
The engines decode during the copies as they do during the push.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from random_zaya import large_policy

from blockroll.model.checkpoint import save_policy
from blockroll.rollout.cluster import EngineSpec, RayCluster
from blockroll.rollout.engine import EngineConfig
from blockroll.rollout.types import RolloutRequest, SamplingParams
from blockroll.trainer_bridge.client import connect
from blockroll.trainer_bridge.gateway import Gateway

LAYERS = int(os.environ.get("BLOCKROLL_PUSH_LAYERS", "12"))
"""12 layers are 2 GB in float32."""
ENGINES = 4


def plain_copies(arrays: list[np.ndarray], folder: Path) -> float:
    """Seconds of the copies."""
    begin = time.monotonic()
    with open(folder / "copy", "wb") as file:
        for array in arrays:
            file.write(array.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
    (folder / "copy").unlink()
    with open("/dev/shm/blockroll-copy", "w+b") as file:
        os.unlink("/dev/shm/blockroll-copy")
        file.truncate(sum(array.nbytes for array in arrays))
        with mmap.mmap(file.fileno(), 0) as shared:
            for array in arrays:
                shared.write(array.reshape(-1).view(np.uint8).data)
    for _ in range(1 + ENGINES):
        for array in arrays:
            np.copyto(np.empty_like(array), array)
    return time.monotonic() - begin


def trainer(pipe) -> None:
    """A process of its own: waits for the address, then pushes all, one small tensor, and nothing new. Sends the seconds of the
    plain copies and of each push."""
    policy = large_policy(LAYERS)
    address, folder = pipe.recv()
    state = {name: tensor for name, tensor in policy.state_dict().items() if name != "lm_head.weight"}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]  # tied: the same memory twice
    with torch.no_grad():
        for tensor in policy.parameters():
            tensor.mul_(1.01)
    pipe.send(plain_copies([tensor.numpy() for name, tensor in state.items() if name != "lm_head.weight"], folder))
    with connect(address, timeout=600) as client:
        for version in (1, 2, 3):
            pipe.recv()
            begin = time.monotonic()
            client.push_weights(version, state, in_flight="keep")
            pipe.send(time.monotonic() - begin)
            if version == 1:
                with torch.no_grad():
                    policy.model.norm.weight.mul_(1.01)


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["ray", "shared_memory"])
def test_a_push_of_two_gigabytes(tmp_path, transport):
    fork = multiprocessing.get_context("fork")
    pipe, end = fork.Pipe()
    process = fork.Process(target=trainer, args=(end,), daemon=True)
    process.start()
    policy = large_policy(LAYERS)
    size = sum(tensor.nbytes for name, tensor in policy.state_dict().items() if name != "lm_head.weight")
    directory = str(save_policy(policy, tmp_path / "policy", "float32"))
    del policy
    params = SamplingParams(sampler="coupled", max_tokens=4000, ignore_eos=True)
    config = EngineConfig(max_batch=2, pages=280, page_size=32)
    cluster = RayCluster(EngineSpec(directory, config, num_cpus=0.5), engines=ENGINES, weight_transport=transport)
    try:
        with (Gateway(cluster, "tcp://127.0.0.1:*", tmp_path / "ledger") as gateway,
              connect(gateway.address, client_id="asking") as client):
            client.submit([RolloutRequest(f"r{i}", (1, 5 + i, 9), params, seed=i) for i in range(ENGINES)])
            while min(tokens_of(cluster)) < 4:
                time.sleep(0.2)
            pipe.send((gateway.address, tmp_path))
            plain = pipe.recv()
            before = tokens_of(cluster)
            pipe.send("push")
            took, decoded = pipe.recv(), [b - a for a, b in zip(before, tokens_of(cluster), strict=True)]
            pauses = [figures(engine)["commit_seconds"] for engine in cluster._engines]
            later = []
            for _ in range(2):
                pipe.send("push")
                later.append(pipe.recv())
    finally:
        cluster.close()
        process.kill()
    print(f"{transport}: {size / 1e9:.2f} GB in {took:.2f} s, plain copies {plain:.2f} s: {plain / took:.2f}x; tokens of each "
          f"engine meanwhile {decoded}; pauses {[round(pause, 3) for pause in pauses]} s; "
          f"one small tensor changed: {later[0]:.2f} s; none: {later[1]:.2f} s")
    assert min(decoded) > 0
    assert 0 < max(pauses) <= 1
    assert plain / took >= 0.6


def figures(engine):
    return ray.get(engine.actor.heartbeat.remote()).figures


def tokens_of(cluster):
    return [figures(engine)["decode_tokens"] for engine in cluster._engines]
