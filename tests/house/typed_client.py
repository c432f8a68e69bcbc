"""A trainer's program that uses all of the client. It is checked by `mypy --strict` and not run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

import blockroll
from blockroll import AsyncRolloutClient, Conversation, RolloutClient, RolloutRequest, SamplingParams, Trajectory


def step(client: RolloutClient, prompts: Sequence[Sequence[int]], weights: dict[str, np.ndarray]) -> float:
    params = SamplingParams(sampler="coupled", n=4, temperature=1.0, max_tokens=64, stop=["\n"])
    requests = [RolloutRequest(f"r{i}", tuple(prompt), params, seed=i) for i, prompt in enumerate(prompts)]
    client.submit(requests)
    found: list[Trajectory] = client.generate(requests, timeout=60.0, on_error="skip", deadline_seconds=30.0)
    logprobs: np.ndarray = np.concatenate([trajectory.logprobs for trajectory in found])
    for trajectory in client.results(timeout=1.0):
        print(trajectory.request_id, trajectory.tokens[0], trajectory.finish_reason, trajectory.tokens_per_forward)
    client.cancel(["r0"])
    client.acknowledge(found)
    version: int = client.push_weights(client.version + 1, weights, in_flight="keep")
    missing: int = client.delivery["missing"]
    return float(logprobs.mean()) + version + missing


def environment(conversation: Conversation) -> list[int] | None:
    return [1] if conversation.trajectories[-1].stop_reason == "\n" else None


async def asynchronous(address: str) -> None:
    async def reply(conversation: Conversation) -> list[int] | None:
        return environment(conversation)

    async with await AsyncRolloutClient.connect(address) as client:
        await blockroll.converse_async(client, [Conversation("a", [1, 2])], reply)
        async for trajectory in client.results():
            print(trajectory.key)
        await client.control().pause("wait", reset_cache=True)


def main(address: str) -> None:
    with blockroll.connect(address, client_id="trainer", ack="manual") as client:
        print(step(client, [[1, 2, 3]], {"w": np.zeros(3, np.float32)}))
        for talk in blockroll.converse(client, [Conversation("b", [1], max_length=99)], environment, timeout=5.0):
            mask: np.ndarray = talk.mask
            print(talk.finish_reason, mask.sum(), talk.versions.max())
        print(client.status()["version"])
        with client.control() as control:
            control.pause("abort", timeout=5.0)
            mode: str = control.paused()
            control.abort(["r0"])
            control.resume()
            print(mode, control.status().figures["in_flight"])
    asyncio.run(asynchronous(address))
