"""Held-out tasks against what a recipe trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from blockroll.errors import DataError
from blockroll.model.conversion.config import ConversionConfig, Data, JsonLines, Stage, Tasks
from blockroll.model.conversion.data import PackStream
from blockroll.model.tasks import make_tasks
from blockroll.rollout.evaluation.training import RECIPE, check_disjoint, heldout_tasks, recipes_of

STAGES = (Stage(name="ar", kind="ar", tokens=3000, pack_tokens=1024),
          Stage(name="d", kind="diffusion", tokens=2500, pack_tokens=512, packs_per_step=2))  # fmt: skip
RUN = ConversionConfig(output="unused", data=Data(pool=8), stages=STAGES)


def trained_on(policy, stage: Stage) -> list:
    """Documents of a stage, and one pack more."""
    taken, seen, packs = 0, 0, PackStream(RUN.data, policy.tokenizer, stage)
    made = []
    while seen < stage.tokens or taken % stage.packs_per_step:
        _, pack = next(packs)
        made += pack
        seen, taken = seen + sum(len(document.tokens) for document in pack), taken + 1
    return [made, next(packs)[1]]


def test_every_document_is_compared(policy) -> None:
    counted: list[int] = []
    result = check_disjoint([RUN], [], make_tasks("heldout", 40), policy.tokenizer, counted.append)
    expected = [trained_on(policy, stage)[0] for stage in STAGES]
    assert result.training_tasks_compared == sum(map(len, expected))
    assert sum(counted) == sum(len(document.tokens) for made in expected for document in made) >= 5500
    assert (result.recipes, result.not_compared) == (1, ())


@pytest.mark.parametrize("number", [0, 1])
def test_a_task_that_was_trained_on_is_an_error(policy, number: int) -> None:
    tasks = make_tasks("heldout", 5)
    made, beyond = trained_on(policy, STAGES[number])

    def with_prompt_of(document):
        prompt = policy.tokenizer.decode(document.tokens[1 : document.prompt])
        return [*tasks[:4], replace(tasks[4], id="gcd:77", prompt=prompt)]

    with pytest.raises(DataError, match=f"gcd:77 is among what stage '{STAGES[number].name}' trained on"):
        check_disjoint([RUN], [], with_prompt_of(made[-1]), policy.tokenizer)
    if number:  # what the last stage would have come to next was not trained on
        assert check_disjoint([RUN], [], with_prompt_of(beyond[0]), policy.tokenizer).training_tasks_compared


def test_files_that_are_not_here_are_named(policy, tmp_path: Path) -> None:
    data = Data(sources=(JsonLines(kind="jsonl", paths=(str(tmp_path / "gone.jsonl"),)),))
    result = check_disjoint([ConversionConfig(output="unused", data=data, stages=STAGES[:1])], ["no recipe"],
                            make_tasks("heldout", 5), policy.tokenizer)  # fmt: skip
    assert result.training_tasks_compared == 0
    assert result.not_compared[0] == "no recipe"
    assert "gone.jsonl" in result.not_compared[1]


def test_heldout_tasks_are_like_those_of_the_recipe() -> None:
    assert {task.family for task in heldout_tasks([], 20, 0)} > {"gcd", "count_bits"}
    harder = Tasks(families=("gcd",), difficulty={"gcd": {"max_value": 400}})
    mixture = (harder, Tasks(families=("gcd",)))
    one, two = (RUN.model_copy(update={"data": Data(sources=sources)}) for sources in ((harder,), mixture))
    assert heldout_tasks([one], 4, 1) == make_tasks("heldout", 4, 1, ["gcd"], harder.difficulty)
    assert heldout_tasks([two], 4, 1) == make_tasks("heldout", 4, 1, ["gcd"])
    # What the last stage was trained on counts, where it has data of its own.
    last = two.stages[-1].model_copy(update={"data": one.data})
    of_its_own = two.model_copy(update={"stages": (*two.stages[:-1], last)})
    assert heldout_tasks([of_its_own], 4, 1) == heldout_tasks([one], 4, 1)


def test_recipes_are_followed_to_the_first_parent(tmp_path: Path) -> None:
    def recipe(name: str, **changes: object) -> Path:
        (tmp_path / name).mkdir()
        text = yaml.safe_dump({"output": "x", "stages": [{"name": name, "kind": "ar", "tokens": 1}], **changes})
        (tmp_path / name / RECIPE).write_text(text)
        (tmp_path / name / "config.json").write_text("{}")
        return tmp_path / name

    first = recipe("first")
    second = recipe("second", parent=str(first))
    found, problems = recipes_of(second)
    assert [run.stages[0].name for run in found] == ["second", "first"]
    assert not problems
    found, (problem,) = recipes_of(recipe("lost", parent="nowhere/at/all"))
    assert len(found) == 1
    assert "nowhere" in problem
    (tmp_path / "bare").mkdir()
    found, (problem,) = recipes_of(tmp_path / "bare")
    assert not found
    assert RECIPE in problem
    (first / RECIPE).write_text("outputt: x")
    found, (problem,) = recipes_of(second)
    assert len(found) == 1
    assert "outputt" in problem
