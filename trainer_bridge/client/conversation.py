"""Multi-turn rollouts: a policy and an environment write one text in turns.

Invariants:
- Token ids are appended and never decoded and encoded again: the prompt of a turn is every token before it, as it was sampled
  or as the environment gave it. So the engine that served the turn before finds the K/V of that text in its prefix cache.
- Each token is either the policy's (mask 1), with its log-probabilities and weight version, or the environment's (mask 0).
- The request of a turn depends on the conversation's id, seed and tokens alone. A trainer that comes back after a crash and
  replies the same submits the same requests and is given the same turns. That needs a client with ack="manual" that acknowledges
  `trajectories` once they are learned from: with ack="auto" a turn is acknowledged as soon as the next one is submitted.

Legend: N = tokens after the first prompt.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ...errors import RequestError
from ...model.arguments import is_whole, short, token_ids
from ...rollout.types import RolloutRequest, SamplingParams, Trajectory
from ...seeds import derived_seed
from .rollout_client import RolloutClient

if TYPE_CHECKING:
    from .async_client import AsyncRolloutClient

ENVIRONMENT_VERSION = -1
"""The weight version of a token that the environment wrote."""


class Conversation:
    """One text that a policy and an environment write in turns.

    Args:
        id: names the conversation for ever; turn k is the request `ID/turn-00k`.
        prompt_tokens: what stands before the first turn.
        params: of every turn; `max_tokens` bounds one turn. A stop string or stop token says where a turn calls a tool.
        seed: of the run, 0 <= seed < 2**63. The seed of a turn is made of it, the conversation's id and the turn's number, so
            conversations with one seed and different ids differ.
        max_length: most tokens of the whole text. The conversation ends where it is reached. Give the policy's maximum, or
            less: a turn whose prompt fills the policy is refused.

    Attributes:
        tokens: the N tokens after the first prompt, of both writers.
        trajectories: what the policy wrote, turn by turn.
        finish_reason: None while it goes on; `stop` where the environment ended it, `length` or `abort` where a turn ended so.
    """

    def __init__(self, id: str, prompt_tokens: Sequence[int], params: SamplingParams | None = None, *, seed: int = 0,
                 max_length: int | None = None) -> None:
        self.params = SamplingParams() if params is None else params
        first = RolloutRequest(id, tuple(prompt_tokens), self.params, seed)
        if first.samples != 1:
            raise RequestError("n", f"{first.samples} samples in one conversation", "make one conversation for each sample")
        if max_length is not None and (not is_whole(max_length) or max_length <= len(first.prompt_tokens)):
            raise RequestError("max_length", f"{short(max_length)} leaves no room after {len(first.prompt_tokens)} prompt tokens",
                               "give more tokens, or None for no limit")  # fmt: skip
        self.id, self.prompt_tokens, self.seed, self.max_length = id, first.prompt_tokens, first.seed, max_length
        self.tokens: list[int] = []
        self.trajectories: list[Trajectory] = []
        self.finish_reason: str | None = None
        self._spans: list[tuple[int, Trajectory]] = []
        self._replied = True

    def __repr__(self) -> str:
        return (f"Conversation({self.id!r}, {len(self.trajectories)} turns, {len(self.tokens)} tokens, "
                f"finish_reason={self.finish_reason!r})")  # fmt: skip

    @property
    def awaits_reply(self) -> bool:
        """Whether the environment is to write next."""
        return self.finish_reason is None and not self._replied

    def request(self) -> RolloutRequest:
        """The request of the next turn; the same one until its trajectory is added."""
        if self.finish_reason is not None or not self._replied:
            state = "has ended" if self.finish_reason is not None else "awaits a reply"
            raise RequestError("conversation", f"{self.id!r} {state}", "call `reply` first, or leave out those that have ended")
        name, params = f"{self.id}/turn-{len(self.trajectories):03d}", self.params
        text = (*self.prompt_tokens, *self.tokens)
        if self.max_length is not None and params.max_tokens > self.max_length - len(text):
            most = self.max_length - len(text)
            params = replace(params, max_tokens=most, min_tokens=min(params.min_tokens, most))
        return RolloutRequest(name, text, params, derived_seed(self.seed, name), 1)

    def add(self, trajectory: Trajectory) -> None:
        """Takes the policy's turn. One that ended by its length, or was aborted, ends the conversation."""
        wanted = self.request()
        if trajectory.request_id != wanted.id or trajectory.prompt_tokens != wanted.prompt_tokens:
            raise RequestError("trajectory", f"{short(trajectory.request_id)} is not the next turn of {self.id!r}",
                               f"add the trajectory of {wanted.id}")  # fmt: skip
        self._spans.append((len(self.tokens), trajectory))
        self.trajectories.append(trajectory)
        self.tokens += trajectory.tokens
        self._replied = False
        if trajectory.finish_reason != "stop":
            self.finish_reason = trajectory.finish_reason

    def reply(self, tokens: Sequence[int] | None) -> None:
        """Appends what the environment writes after the policy's turn; None ends the conversation."""
        if not self.awaits_reply:
            raise RequestError("conversation", f"{self.id!r} awaits no reply", "add the policy's turn first")
        if tokens is None:
            self.finish_reason = "stop"
            return
        self.tokens += token_ids(tokens, "reply")
        self._replied = True
        if self.max_length is not None and len(self.prompt_tokens) + len(self.tokens) >= self.max_length:
            self.finish_reason = "length"

    @property
    def mask(self) -> np.ndarray:
        """int8[N]: 1 for the policy's tokens, 0 for the environment's."""
        return self._filled(np.zeros(len(self.tokens), np.int8), lambda trajectory: np.int8(1))

    @property
    def logprobs(self) -> np.ndarray:
        """float32[N]: `Trajectory.logprobs` of the policy's tokens, 0 for the environment's."""
        return self._filled(np.zeros(len(self.tokens), np.float32), lambda trajectory: trajectory.logprobs)

    @property
    def behavior_logprobs(self) -> np.ndarray:
        """float32[N]: `Trajectory.behavior_logprobs` of the policy's tokens, 0 for the environment's."""
        return self._filled(np.zeros(len(self.tokens), np.float32), lambda trajectory: trajectory.behavior_logprobs)

    @property
    def versions(self) -> np.ndarray:
        """int32[N]: the weight version that made each of the policy's tokens, ENVIRONMENT_VERSION for the environment's."""
        empty = np.full(len(self.tokens), ENVIRONMENT_VERSION, np.int32)
        return self._filled(empty, lambda trajectory: trajectory.versions)

    def _filled(self, values: np.ndarray, of: Callable[[Trajectory], np.ndarray | np.int8]) -> np.ndarray:
        for start, trajectory in self._spans:
            values[start : start + len(trajectory.tokens)] = of(trajectory)
        return values


Environment = Callable[[Conversation], Sequence[int] | None]
"""What the environment writes after the policy's turn, as token ids; None where the conversation ends. The policy's turn is
`conversation.trajectories[-1]`."""
AsyncEnvironment = Callable[[Conversation], Awaitable[Sequence[int] | None]]
Generate = Callable[[list[RolloutRequest]], Iterable[Trajectory]]


def converse(source: RolloutClient | Generate, conversations: Iterable[Conversation], environment: Environment,
             timeout: float | None = None) -> list[Conversation]:
    """Plays conversations to their ends; returns those that were given.

    After an error of the client or the environment, call it again with the same conversations to go on.

    Args:
        source: a client, with which each conversation goes on as soon as its turn has come; or a function that serves a list
            of requests, such as `engine.rollout`, with which all conversations take their turns together.
        environment: called once for each turn that ended by a stop token or a stop string.
        timeout: of a client, as in `RolloutClient.results`.

    Raises:
        RequestError: two conversations share an id, or the client has other requests under way.
        RequestRefused: a turn cannot be served, for instance because the text fills the policy.
    """
    played = _distinct(conversations)
    _reply([conversation for conversation in played if conversation.awaits_reply], environment)
    if isinstance(source, RolloutClient):
        _stream(source, played, environment, timeout)
    else:
        while going := {c.request().id: c for c in played if c.finish_reason is None}:
            for trajectory in source([conversation.request() for conversation in going.values()]):
                going[trajectory.request_id].add(trajectory)
            _reply([conversation for conversation in going.values() if conversation.awaits_reply], environment)
    return played


def _distinct(conversations: Iterable[Conversation]) -> list[Conversation]:
    played = list(conversations)
    if len({conversation.id for conversation in played}) < len(played):
        raise RequestError("conversations", "two of them share an id", "give each its own")
    return played


def _reply(conversations: Iterable[Conversation], environment: Environment) -> None:
    for conversation in conversations:
        conversation.reply(environment(conversation))


def _stream(client: RolloutClient, played: Sequence[Conversation], environment: Environment, timeout: float | None) -> None:
    requests = {conversation.request().id: conversation for conversation in played if conversation.finish_reason is None}
    client.submit([conversation.request() for conversation in requests.values()])
    while requests:
        found = client.take(timeout, "raise")
        if found is None:  # its trajectory was handed out by another call
            raise RequestError("conversations", f"the turn {next(iter(requests))!r} was handed out already",
                               "add its trajectory to the conversation first")  # fmt: skip
        item, trajectory = found
        conversation = requests.pop(trajectory.request_id, None)
        if conversation is None:
            client.give_back(item)
            raise RequestError("conversations", f"request {trajectory.request_id!r} of this client is under way as well",
                               "collect it first, or use another client")  # fmt: skip
        conversation.add(trajectory)
        if conversation.awaits_reply:
            conversation.reply(environment(conversation))
        if conversation.finish_reason is None:
            turn = conversation.request()
            requests[turn.id] = conversation
            client.submit([turn])


async def converse_async(client: AsyncRolloutClient, conversations: Iterable[Conversation], environment: AsyncEnvironment,
                         timeout: float | None = None) -> list[Conversation]:
    """`converse` for asyncio. Each conversation is a task, so environments wait for their tools side by side. An error of one is
    raised once the turns that are being sampled have come; the other conversations stay where they are then."""
    import asyncio  # takes 50 ms, and a trainer without it does not need it

    played, sampling, stopped = _distinct(conversations), set[str](), asyncio.Event()

    async def play(conversation: Conversation) -> None:
        while conversation.finish_reason is None and not stopped.is_set():
            if not conversation.awaits_reply:
                sampling.add(conversation.id)
                (trajectory,) = await client.generate([conversation.request()], timeout)
                sampling.discard(conversation.id)
                conversation.add(trajectory)
            if conversation.awaits_reply and not stopped.is_set():
                conversation.reply(await environment(conversation))

    tasks = {conversation.id: asyncio.ensure_future(play(conversation)) for conversation in played}
    try:
        await asyncio.gather(*tasks.values())
    except Exception:
        stopped.set()
        for name in tasks.keys() - sampling:  # a turn that has been sampled must not be lost: its id is used up
            tasks[name].cancel()
        raise
    finally:
        await asyncio.gather(*tasks.values(), return_exceptions=True)
    return played
