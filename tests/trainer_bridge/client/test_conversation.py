"""Conversations of several turns: who wrote which token, on an engine of this process and over the bridge, with kills between."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bridge_parts import Served, ToyBackend, make_trajectory

import blockroll
from blockroll.errors import RequestError
from blockroll.rollout.types import SamplingParams, Trajectory
from blockroll.trainer_bridge.client import Conversation, connect, converse, converse_async
from blockroll.trainer_bridge.client.async_client import AsyncRolloutClient
from blockroll.trainer_bridge.client.conversation import ENVIRONMENT_VERSION
from blockroll.trainer_bridge.gateway import Gateway

PARAMS = SamplingParams(sampler="coupled", max_tokens=24, stop=["="])
TURNS = 3


class Stopping(ToyBackend):
    """Samples end by themselves, so that conversations go on."""

    def poll(self, timeout):  # type: ignore[no-untyped-def]
        found = super().poll(timeout)
        for done in found:
            if done.trajectory is not None:
                done.trajectory.finish_reason = "stop"
        return found


def reply(conversation: Conversation) -> list[int] | None:
    """Two tokens that depend on the turn, and an end after TURNS turns."""
    turn = len(conversation.trajectories)
    return None if turn == TURNS else [turn, conversation.trajectories[-1].tokens[-1]]


def toys(count: int) -> list[Conversation]:
    return [Conversation(f"talk-{i}", [1, 2, 3 + i], SamplingParams(max_tokens=5), max_length=60) for i in range(count)]


def check(conversation: Conversation) -> None:
    """Every token has its writer, and the policy's tokens are those of its trajectories, in their order."""
    text = [*conversation.prompt_tokens, *conversation.tokens]
    mask = conversation.mask.astype(bool)
    by_policy = [token for trajectory in conversation.trajectories for token in trajectory.tokens]
    assert [token for token, own in zip(conversation.tokens, mask, strict=True) if own] == by_policy
    for name in ("logprobs", "behavior_logprobs", "versions"):
        values = getattr(conversation, name)
        wanted = np.concatenate([getattr(trajectory, name) for trajectory in conversation.trajectories])
        assert values[mask].tolist() == wanted.tolist() and len(values) == len(conversation.tokens)
    assert set(conversation.versions[~mask].tolist()) <= {ENVIRONMENT_VERSION}
    for trajectory in conversation.trajectories:
        assert text[: len(trajectory.prompt_tokens)] == list(trajectory.prompt_tokens)
    ids = [trajectory.request_id for trajectory in conversation.trajectories]
    assert ids == [f"{conversation.id}/turn-{k:03d}" for k in range(len(ids))]


@pytest.fixture(scope="module")
def engine() -> blockroll.Engine:
    return blockroll.Engine("tiny-reasoner", device="cpu", max_batch=8, page_size=16)


def test_an_engine_serves_a_conversation_and_computes_again_what_is_new_alone(engine: blockroll.Engine) -> None:
    tokenizer = engine.policy.tokenizer
    prompt = [tokenizer.bos_token_id, *tokenizer.encode("Q:47+85-12+33+21-9+55\nS:")]

    def calculator(conversation: Conversation) -> list[int] | None:
        ended_by = conversation.trajectories[-1].stop_reason
        return tokenizer.encode("7", add_special_tokens=False) if ended_by == "=" else None

    before = engine.cached_tokens
    (talk,) = converse(engine.rollout, [Conversation("talk", prompt, PARAMS, max_length=200)], calculator)
    check(talk)
    assert len(talk.trajectories) > 2 and (talk.mask == 0).sum() == len(talk.trajectories) - 1
    # Of each turn's prompt all full pages but, at most, the last are known.
    known = sum(len(trajectory.prompt_tokens) // 16 * 16 - 16 for trajectory in talk.trajectories[1:])
    assert engine.cached_tokens - before >= known > 0
    # Log-probabilities of the whole text, scored at once, are those of the turns.
    (scored,) = engine.policy.logprobs([talk.prompt_tokens], [talk.tokens])
    mask = talk.mask.astype(bool)
    assert np.abs(scored.numpy()[mask] - talk.logprobs[mask]).max() < 1e-4
    # Without the environment's tokens there would be another text: the policy read them.
    again = Conversation("talk", prompt, PARAMS, max_length=200)
    converse(engine.rollout, [again], lambda c: None)
    assert again.tokens == talk.trajectories[0].tokens and again.finish_reason == "stop"


def test_a_conversation_ends_at_its_longest(engine: blockroll.Engine) -> None:
    prompt = [1, *engine.policy.tokenizer.encode("Q:47+85-12\nS:")]
    talk = Conversation("long", prompt, SamplingParams(sampler="coupled", max_tokens=24, stop=["+", "-", "="]),
                        max_length=len(prompt) + 10)
    converse(engine.rollout, [talk], lambda c: [20])
    assert talk.finish_reason == "length" and len(talk.prompt_tokens) + len(talk.tokens) <= talk.max_length
    check(talk)


@pytest.mark.parametrize("twin", [False, True])
def test_clients_stream_conversations(serve: Callable[..., Gateway], twin: bool) -> None:
    gateway = serve(Stopping(rate=2000.0))
    talks = toys(20)
    if twin:
        async def run() -> None:
            async def answer(conversation: Conversation) -> list[int] | None:
                await asyncio.sleep(0)
                return reply(conversation)

            async with await AsyncRolloutClient.connect(gateway.address) as client:
                await converse_async(client, talks, answer)
                assert client.delivery["missing"] == 0

        asyncio.run(run())
    else:
        with connect(gateway.address) as client:
            assert converse(client, talks, reply, timeout=10) == talks
            assert client.delivery["missing"] == 0
    for talk in talks:
        check(talk)
        assert talk.finish_reason == "stop" and len(talk.trajectories) == TURNS
    assert len({tuple(talk.tokens) for talk in talks}) == len(talks)


def test_after_an_error_of_the_environment_the_same_conversations_go_on(serve: Callable[..., Gateway]) -> None:
    gateway, failed = serve(Stopping()), []

    def unsure(conversation: Conversation) -> list[int] | None:
        if len(failed) < 5:
            failed.append(conversation.id)
            raise OSError("the tool is away")
        return reply(conversation)

    talks = toys(8)
    with connect(gateway.address) as client:
        for _ in range(5):
            with pytest.raises(OSError, match="tool"):
                converse(client, talks, unsure, timeout=10)
        converse(client, talks, unsure, timeout=10)
        assert client.delivery["missing"] == 0 and client.delivery["unique"] == 8 * TURNS
    for talk in talks:
        check(talk)


def test_an_error_of_one_conversation_leaves_no_other_running(serve: Callable[..., Gateway]) -> None:
    gateway, talks, ran = serve(Stopping()), toys(4), list[str]()

    async def slow(conversation: Conversation) -> list[int] | None:
        if not ran:
            ran.append("failed")
            raise OSError("the tool is away")
        await asyncio.sleep(0.1)
        ran.append(conversation.id)
        return reply(conversation)

    async def play() -> None:
        async with await AsyncRolloutClient.connect(gateway.address) as client:
            with pytest.raises(RequestError, match="conversations: two of them share an id"):
                await converse_async(client, [talks[0], talks[0]], slow)
            with pytest.raises(OSError, match="tool"):
                await converse_async(client, talks, slow, 10)
            await asyncio.sleep(0.3)
            assert ran == ["failed"]
            await converse_async(client, talks, slow, 10)
            assert len(ran) == 1 + len(talks) * TURNS and client.delivery["missing"] == 0

    asyncio.run(play())
    for talk in talks:
        check(talk)


TRAINER = """
import os, signal, sys
sys.path[:0] = sys.argv[2:4]
from test_conversation import reply, toys
from blockroll.trainer_bridge.client import connect, converse
talks, killed = toys(6), int(sys.argv[4])
def dying(conversation):
    if sum(len(talk.trajectories) for talk in talks) == killed:
        os.kill(os.getpid(), signal.SIGKILL)
    return reply(conversation)
with connect(sys.argv[1], client_id="trainer", ack="manual", timeout=20) as client:
    converse(client, talks, dying, timeout=20)
    client.acknowledge([trajectory for talk in talks for trajectory in talk.trajectories])
    for talk in talks:
        print(talk.id, *talk.tokens)
"""


def test_a_trainer_that_is_killed_between_turns_comes_back_to_the_same_conversations(serve: Callable[..., Gateway]) -> None:
    here = Path(__file__).parent
    gateway = serve(Stopping(rate=500.0))
    for killed in (4, 11, 0):
        command = [sys.executable, "-c", TRAINER, gateway.address, str(here), str(here.parent), str(killed)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        assert done.returncode == (-signal.SIGKILL if killed else 0), done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in lines] == [f"talk-{i}" for i in range(6)]
    for talk, (_, *tokens) in zip(toys(6), lines, strict=True):
        assert undisturbed(talk).tokens == list(map(int, tokens))


def undisturbed(talk: Conversation) -> Conversation:
    """The conversation as the backend's rule makes it, without a service."""

    def serve_turns(requests: list) -> list[Trajectory]:
        made = [make_trajectory(request, 0) for request in requests]
        for trajectory in made:
            trajectory.finish_reason = "stop"
        return made

    return converse(serve_turns, [talk], reply)[0]


def test_a_gateway_that_is_killed_between_turns_loses_none(served: Callable[..., Served]) -> None:
    gateway = served(300.0)
    killed = []

    def reply_and_kill(conversation: Conversation) -> list[int] | None:
        if len(conversation.trajectories) == 2 and len(killed) < 2:
            killed.append(conversation.id)
            gateway.kill()
            gateway.start()
        return reply(conversation)

    talks = [Conversation(f"talk-{i}", [1, 2, 3 + i], SamplingParams(max_tokens=5)) for i in range(6)]
    for talk in talks:  # this backend's samples end by their length
        talk.add = stopping(talk)  # type: ignore[method-assign]
    with connect(gateway.address, timeout=20) as client:
        converse(client, talks, reply_and_kill, timeout=20)
        assert client.delivery["missing"] == 0
    assert len(killed) == 2
    for talk in talks:
        check(talk)
        assert len(talk.trajectories) == TURNS


def stopping(talk: Conversation) -> Callable[[Trajectory], None]:
    def add(trajectory: Trajectory) -> None:
        trajectory.finish_reason = "stop"
        Conversation.add(talk, trajectory)

    return add


def test_what_cannot_be_is_refused(serve: Callable[..., Gateway]) -> None:
    for arguments, options, word in (
        (("a", []), {}, "prompt_tokens"), (("", [1]), {}, "id"), (("a", [1], SamplingParams(n=2)), {}, "one conversation"),
        (("a", [1, 2]), {"max_length": 2}, "max_length"), (("a", [1]), {"seed": -1}, "seed"),
    ):
        with pytest.raises(RequestError, match=word):
            Conversation(*arguments, **options)  # type: ignore[arg-type]
    talk = Conversation("a", [1, 2], SamplingParams(max_tokens=5))
    with pytest.raises(RequestError, match="awaits no reply"):
        talk.reply([1])
    request = talk.request()
    assert talk.request() == request and request.id == "a/turn-000"
    with pytest.raises(RequestError, match="not the next turn"):
        talk.add(make_trajectory(blockroll.RolloutRequest("b/turn-000", (1, 2), request.params, 1), 0))
    with pytest.raises(RequestError, match="share an id"):
        converse(lambda requests: [], [talk, Conversation("a", [5])], reply)
    gateway = serve(Stopping())
    with connect(gateway.address) as client:
        client.submit([blockroll.RolloutRequest("elsewhere", (1, 2), SamplingParams(max_tokens=3))])
        with pytest.raises(RequestError, match="'elsewhere' of this client"):
            for _ in range(2):
                converse(client, [Conversation(f"late-{_}", [1, 2], SamplingParams(max_tokens=3))], lambda c: None, timeout=10)
        assert [t.request_id for t in client.results(timeout=10) if t.request_id == "elsewhere"] == ["elsewhere"]


def test_seeds_of_turns_differ_between_conversations_and_turns() -> None:
    seeds = {Conversation(f"c{i}", [1], SamplingParams(), seed=5).request().seed for i in range(10)}
    assert len(seeds) == 10
    assert Conversation("c0", [1], seed=5).request().seed in seeds and Conversation("c0", [1], seed=6).request().seed not in seeds
