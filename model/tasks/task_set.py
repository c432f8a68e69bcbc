"""What a trainer and an evaluation draw tasks from and score answers with.

Invariant: `draw` and `heldout` are functions of their arguments; what they give, and `score`, never depends on earlier calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..tokenizer import encode_prompt
from .tasks import Task, make_tasks, score


@dataclass(frozen=True)
class Answer:
    """What a policy wrote for a task. `text`: without special tokens. `finish_reason`: `stop`, `length` or `abort`."""

    text: str
    tokens: Sequence[int]
    finish_reason: str


def answer_of(tokenizer: Any, tokens: Sequence[int], finish_reason: str) -> Answer:
    """What a policy with this tokenizer wrote; without text where it has none."""
    text = "" if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=True)
    return Answer(text, tokens, finish_reason)


class AnyTask(Protocol):
    """A task, whatever it comes from. `completion`: the reference answer as text, or None."""

    @property
    def id(self) -> str: ...

    @property
    def family(self) -> str: ...

    @property
    def completion(self) -> str | None: ...


class TaskSet(Protocol):
    """Tasks that are trained on, tasks that are held out, and what answers are worth."""

    @property
    def digest(self) -> str:
        """Of everything that files hold of the tasks; empty where there are no files."""
        ...

    @property
    def late(self) -> int:
        """Rewards that took too long to compute, so far."""
        ...

    def draw(self, number: int, count: int, seed: int) -> Sequence[AnyTask]:
        """`count` tasks of batch `number`, to train on."""
        ...

    def heldout(self, count: int, seed: int) -> Sequence[AnyTask]:
        """At most `count` tasks that are never drawn, in an order of their own."""
        ...

    def score(self, answers: Sequence[tuple[Any, Answer]]) -> list[float | None]:
        """A reward for each answer of a task; None where there is none."""
        ...

    def prompt_tokens(self, task: Any, tokenizer: Any) -> tuple[int, ...]:
        """The token ids of a task's prompt."""
        ...

    def close(self) -> None:
        """Gives up what the rewards need."""
        ...


class ReasoningGym:
    """Tasks of reasoning-gym, of any number. An answer that did not end by itself is worth 0.

    Args:
        families: to draw from; empty for all.
    """

    digest, late = "", 0

    def __init__(self, families: Sequence[str] = ()) -> None:
        self._families = tuple(families) or None

    def draw(self, number: int, count: int, seed: int) -> Sequence[Task]:
        return make_tasks("rl", count, seed, self._families)

    def heldout(self, count: int, seed: int) -> Sequence[Task]:
        return make_tasks("heldout", count, seed, self._families)

    def score(self, answers: Sequence[tuple[Any, Answer]]) -> list[float | None]:
        return [score(task, answer.text) if answer.finish_reason == "stop" else 0.0 for task, answer in answers]

    def prompt_tokens(self, task: Any, tokenizer: Any) -> tuple[int, ...]:
        return tuple(encode_prompt(tokenizer, task.prompt))

    def close(self) -> None:
        pass
