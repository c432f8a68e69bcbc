"""Tasks, their disjoint splits, and their verifier.

Invariants:
- A task is a function of its id, `family:index` (`family(option=value):index` at another difficulty than the family's
  own); nothing else has to be stored to make it again.
- A task's split is a function of its question's text, so no question is ever in two splits, whatever the seeds.
- The verdict is reasoning-gym's own verifier's, and only full marks count.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from ...errors import DataError
from .families import FAMILIES
from .prompts import ANSWER, answer, question

Split = Literal["train", "rl", "heldout"]
SPLITS: dict[Split, range] = {"train": range(0, 80), "rl": range(80, 90), "heldout": range(90, 100)}
"""Percentiles of the question's hash that belong to each split."""

_ID = re.compile(r"(?P<family>\w+)(\((?P<options>[\w=,-]+)\))?:(?P<index>[0-9]+)")
_INDICES = 10**9
_SEED = 20_011


@dataclass(frozen=True)
class Task:
    """A question with its worked solution.

    Attributes:
        prompt: the question, up to and including the mark after which the steps begin.
        completion: steps, answer mark and answer (no end-of-sequence token).
        entry: reasoning-gym's entry, which its verifier wants.
    """

    id: str
    family: str
    prompt: str
    completion: str
    answer: str
    entry: dict[str, Any] = field(repr=False, compare=False)

    @property
    def unworked(self) -> str:
        """The completion of one who shows no steps."""
        return self.completion[self.completion.rindex(ANSWER):]


def families() -> tuple[str, ...]:
    """Names of all families."""
    return tuple(FAMILIES)


@cache
def _dataset(family: str, options: str = "") -> Any:
    """reasoning-gym's data set; `options` is the part of an id in parentheses."""
    import reasoning_gym  # takes a second and a dozen libraries, which policies and benches can do without

    changes = {name: int(value) for name, _, value in (o.partition("=") for o in options.split(",") if o)}
    difficulty = {**FAMILIES[family].difficulty, **changes}
    try:
        return reasoning_gym.create_dataset(family, size=_INDICES, seed=_SEED, **difficulty)
    except (TypeError, AssertionError) as error:
        remedy = f"use options like those the family has, {dict(FAMILIES[family].difficulty)}"
        raise DataError("difficulty", f"{family} cannot take {changes} ({error})", remedy) from error


def task_from_id(task_id: str) -> Task:
    """The task of an id; DataError for anything else."""
    match = _ID.fullmatch(task_id)
    if match is None or match["family"] not in FAMILIES or int(match["index"]) >= _INDICES:
        raise DataError("task id", f"{task_id!r} names no task", f"use family:index with a family of {families()}")
    family, writer = match["family"], FAMILIES[match["family"]]
    entry = _dataset(family, match["options"] or "")[int(match["index"])]
    steps = ";".join(writer.steps(entry["metadata"]))
    return Task(
        id=task_id,
        family=family,
        prompt=question(writer.question(entry["metadata"])),
        completion=f"{steps}{ANSWER}{entry['answer']}",
        answer=entry["answer"],
        entry=entry,
    )


def split_of(prompt: str) -> Split:
    """The split a question belongs to."""
    percentile = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % 100
    return next(name for name, share in SPLITS.items() if percentile in share)


def make_tasks(
    split: Split,
    count: int,
    seed: int = 0,
    only: Sequence[str] | None = None,
    difficulty: Mapping[str, Mapping[str, int]] | None = None,
) -> list[Task]:
    """`count` tasks of one split, families in turn, no question twice.

    Args:
        seed: other seeds draw other tasks of the same split.
        only: families to draw from; all by default.
        difficulty: by family, options of its reasoning-gym data set that replace the family's own.
    """
    if split not in SPLITS:
        raise DataError("split", f"unknown split {split!r}", f"use one of {', '.join(SPLITS)}")
    chosen = tuple(only) if only else families()
    if unknown := set(chosen) - set(FAMILIES):
        raise DataError("families", f"unknown families {sorted(unknown)}", f"use some of {', '.join(families())}")
    options = {family: ",".join(f"{k}={v}" for k, v in sorted(changes.items()))
               for family, changes in (difficulty or {}).items() if changes}
    if unknown := set(options) - set(FAMILIES):
        raise DataError("difficulty", f"unknown families {sorted(unknown)}", f"use some of {', '.join(families())}")
    named = {family: f"{family}({options[family]})" if family in options else family for family in chosen}
    draws = {family: random.Random(f"{split}/{family}/{seed}") for family in chosen}
    tasks: list[Task] = []
    seen: set[str] = set()
    attempts = 0
    while len(tasks) < count:
        family = chosen[len(tasks) % len(chosen)]
        task = task_from_id(f"{named[family]}:{draws[family].randrange(_INDICES)}")
        attempts += 1
        if split_of(task.prompt) == split and task.prompt not in seen:
            seen.add(task.prompt)
            tasks.append(task)
            attempts = 0
        elif attempts > 20_000:
            raise DataError("count", f"family {family} has no {count} different tasks in {split}", "ask for fewer")
    return tasks


def score(task: Task, completion: str) -> float:
    """1.0 if the answer after the last `A:` is right, else 0.0; any text is accepted."""
    found = answer(completion)
    return 0.0 if found is None else float(_dataset(task.family).score_answer(answer=found, entry=task.entry) == 1.0)
