"""Which tasks a policy is judged on, and whether they were among what it was trained on.

Invariants:
- The training documents are drawn again from the recipe beside the policy, and from the recipes of its parents as far as
  they can be found: as many of each stage as the stage trained on.
- A document that begins with a task's prompt, token for token, is an overlap, and an error.
- What could not be compared is said, not passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import BlockrollError, DataError
from ...model.checkpoint import resolve
from ...model.conversion.config import ConversionConfig, Stage, Tasks
from ...model.conversion.data import Document, PackStream
from ...model.tasks import Task, make_tasks
from ...model.tasks.task_set import AnyTask, ReasoningGym, TaskSet
from ...settings import load_yaml

RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Disjointness:
    """What was compared.

    Attributes:
        training_tasks_compared: training documents, each time one was trained on.
        recipes: how many recipes they were drawn from.
        not_compared: why documents were left out, if any were.
    """

    training_tasks_compared: int
    recipes: int
    not_compared: tuple[str, ...]


def recipes_of(directory: Path) -> tuple[list[ConversionConfig], list[str]]:
    """The recipes of a policy and of its parents, and what stopped the search."""
    recipes: list[ConversionConfig] = []
    while (path := directory / RECIPE).is_file():
        try:
            recipes.append(load_yaml(path, ConversionConfig))
            if recipes[-1].parent is None:
                return recipes, []
            directory = resolve(recipes[-1].parent)
        except BlockrollError as error:  # of another version of the recipe's language, or of another machine
            return recipes, [str(error)]
    return recipes, [f"no {RECIPE} beside the policy, or beside a parent that its recipe names"]


def heldout_tasks(recipes: Sequence[ConversionConfig], count: int, seed: int) -> list[Task]:
    """Held-out tasks of the families the last stage was trained on, and as difficult as its only source of tasks says; at
    their own difficulty where there are several."""
    if not recipes:
        return make_tasks("heldout", count, seed)
    data = recipes[0].runs[-1].data or recipes[0].data
    sources = [source for source in data.sources if isinstance(source, Tasks)]
    difficulty = sources[0].difficulty if len(sources) == 1 else None
    return make_tasks("heldout", count, seed, data.families or None, difficulty)


def check_disjoint(
    recipes: Sequence[ConversionConfig],
    not_compared: Sequence[str],
    tasks: Sequence[AnyTask],
    tokenizer: Any,
    on_documents: Callable[[int], None] = lambda tokens: None,
    source: TaskSet | None = None,
) -> Disjointness:
    """Compare the tasks with the documents of the recipes.

    Args:
        on_documents: called with the clean tokens of each pack that was drawn.
        source: what the tasks came from; reasoning-gym by default.

    Raises:
        DataError: a task is among the documents.
    """
    source = source or ReasoningGym()
    prompts = {source.prompt_tokens(task, tokenizer): task.id for task in tasks}
    lengths = sorted({len(prompt) for prompt in prompts})
    compared, left_out = 0, list(not_compared)
    for recipe in recipes:
        for stage in recipe.runs:
            found = None
            try:
                for documents in _drawn(recipe, stage, tokenizer):
                    heads = [tuple(document.tokens[: lengths[-1]]) for document in documents]
                    found = next((prompts[head[:n]] for head in heads for n in lengths if head[:n] in prompts), None)
                    if found is not None:
                        break
                    compared += len(documents)
                    on_documents(sum(len(document.tokens) for document in documents))
            except DataError as error:  # files that are not here
                left_out.append(f"stage {stage.name}: {error}")
            if found is not None:
                raise DataError("tasks", f"{found} is among what stage {stage.name!r} trained on",
                                "evaluate on tasks the policy has not seen: another --seed, or other families")  # fmt: skip
    return Disjointness(compared, len(recipes), tuple(left_out))


def _drawn(recipe: ConversionConfig, stage: Stage, tokenizer: Any) -> Iterator[list[Document]]:
    """The packs a stage trained on."""
    seen = taken = 0
    for _, documents in PackStream(recipe.data, tokenizer, stage):
        yield documents
        seen, taken = seen + sum(len(document.tokens) for document in documents), taken + 1
        # A step's packs are trained on together.
        if seen >= stage.tokens and taken % stage.packs_per_step == 0:
            return
