"""Tasks and records as documents."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conversion_parts import curve, packs, recipe

from blockroll.errors import ConfigError, DataError
from blockroll.model.conversion.config import ConversionConfig, Data, Stage
from blockroll.model.conversion.data import texts
from blockroll.model.conversion.train import new_policy, run
from blockroll.settings import parse

EASY = dict(kind="tasks", families=["chain_sum", "products"],
            difficulty=dict(chain_sum=dict(max_terms=3), products=dict(max_digits=1)))  # fmt: skip


def data(*sources: dict, **fields) -> Data:
    return parse({"pool": 16, "sources": list(sources), **fields}, Data, "data")


def prompts(run_data: Data, stage: Stage, tokenizer) -> list[str]:
    pack = next(packs(run_data, tokenizer, stage))
    return [tokenizer.decode(document.tokens[: document.prompt]) for document in pack]


def terms(questions: list[str]) -> set[int]:
    return {len(re.findall("[+-]", question)) + 1 for question in questions if "*" not in question}


def test_a_stage_may_have_easier_tasks_than_the_run(tmp_path: Path) -> None:
    tokenizer = new_policy(recipe(tmp_path)).tokenizer
    easy, usual = data(EASY), data({**EASY, "difficulty": {}})
    plain = Stage(name="s", kind="ar", tokens=1)
    assert terms(prompts(easy, plain, tokenizer)) == {3}
    assert max(terms(prompts(usual, plain, tokenizer))) > 3
    assert terms(prompts(usual, plain.model_copy(update={"data": easy}), tokenizer)) == {3}
    assert all(re.search(r"Q:\d\*\d\n", question) for question in prompts(easy, plain, tokenizer) if "*" in question)


def test_a_share_of_the_answers_comes_without_its_steps(tmp_path: Path) -> None:
    tokenizer = new_policy(recipe(tmp_path)).tokenizer
    stage = Stage(name="s", kind="ar", tokens=1, pack_tokens=100_000)

    def answers(unworked: float) -> list[str]:
        pack = next(packs(data(dict(kind="tasks", families=["chain_sum"], unworked=unworked), pool=400), tokenizer, stage))
        return [tokenizer.decode(document.tokens[document.prompt :], skip_special_tokens=True) for document in pack]

    worked, some = answers(0.0), answers(0.25)
    bare = [answer for answer in some if re.fullmatch(r"\nA:-?\d+", answer)]
    assert 60 <= len(bare) <= 140 and not any(answer.startswith("\nA:") for answer in worked)
    assert {answer[answer.index("\nA:"):] for answer in worked} >= set(bare)


@pytest.mark.parametrize(("difficulty", "problem"), [
    ({"gdc": {"max_value": 3}}, "unknown families ['gdc'] in recipe; use some of chain_sum, gcd"),
    ({"gcd": {"max_value": 30}}, "'gcd' is none of families in recipe; add it there"),
    ({"products": {"digits": 3}}, "products cannot take {'digits': 3}"),
    ({"products": {"max_digits": 0}}, "products cannot take {'max_digits': 0}"),
    ({"products": {"max_digits": "two"}}, "it should be a valid integer"),
])  # fmt: skip
def test_impossible_difficulties_name_the_key(difficulty: dict, problem: str) -> None:
    with pytest.raises((ConfigError, DataError)) as refused:
        parse(dict(sources=[{**EASY, "difficulty": difficulty}]), Data, "recipe")
    assert "difficulty" in refused.value.field and problem in str(refused.value)


def test_pools_that_want_more_tasks_than_there_are(tmp_path: Path) -> None:
    tokenizer = new_policy(recipe(tmp_path)).tokenizer
    with pytest.raises(DataError, match=r"family products has no 1800 different tasks in train; lower `pool`"):
        next(packs(data(EASY, pool=1800), tokenizer, Stage(name="s", kind="ar", tokens=1)))


def test_an_interrupted_stage_keeps_its_data(tmp_path: Path) -> None:
    def stopped(config: ConversionConfig) -> None:
        def stop(row: dict) -> None:
            if row["step"] == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(config, stop)

    own = dict(name="own", kind="ar", tokens=1600, checkpoint_steps=2, data=dict(pool=8, sources=[EASY]))
    stopped(recipe(tmp_path, own))
    harder = {**EASY, "difficulty": {}}
    with pytest.raises(ConfigError, match=r"stages\.own\.data"):
        run(recipe(tmp_path, {**own, "data": dict(pool=8, sources=[harder])}))
    run(recipe(tmp_path, own, data=dict(pool=9)))  # not this stage's
    assert curve(tmp_path)[-1]["tokens"] >= 1600

    stopped(recipe(tmp_path, {**own, "name": "runs"} | {"data": None}, data=dict(pool=8, sources=[EASY])))
    with pytest.raises(ConfigError, match=r"stages\.runs\.data"):
        run(recipe(tmp_path, {**own, "name": "runs"} | {"data": None}, data=dict(pool=8, sources=[harder])))


def test_a_tokenizer_is_learned_from_the_runs_data(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"the quick brown zebra number {i} jumps"}) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = dict(kind="jsonl", paths=[str(tmp_path / "*.jsonl")])
    assert sorted(texts(data(source), 4096)) == sorted(json.loads(line)["text"] for line in lines)
    tokenizer = new_policy(recipe(tmp_path, data=dict(sources=[source]))).tokenizer
    assert len(tokenizer.encode(" zebra")) == 1
    both = list(texts(data({**source, "weight": 3.0}, EASY), 40))
    assert sum("zebra" in text for text in both) == 30 and len(both) == 40
    rollouts = dict(kind="rollouts", paths=[str(tmp_path / "*.jsonl")])
    with pytest.raises(DataError, match="no tokenizer"):
        list(texts(data(rollouts), 10))
