"""Tasks: made again from their ids, never in two splits, and worked rightly."""

from __future__ import annotations

import re

import pytest

from blockroll.errors import DataError
from blockroll.model.tasks import families, make_tasks, score, task_from_id
from blockroll.model.tasks.families import add, carry
from blockroll.model.tokenizer import MASK, encode_prompt, train_tokenizer


def test_a_task_is_a_function_of_its_id():
    for task in make_tasks("train", 10):
        again = task_from_id(task.id)
        assert again == task
        assert again.entry == task.entry


def test_another_difficulty_is_part_of_the_id():
    easier = {"chain_sum": {"max_terms": 3, "max_digits": 2}}
    tasks = make_tasks("train", 30, only=["chain_sum", "gcd"], difficulty=easier)
    sums = [t for t in tasks if t.family == "chain_sum"]
    assert all(len(re.findall("[+-]", t.prompt)) == 2 and score(t, t.completion) == 1.0 for t in sums)
    assert all(task_from_id(t.id) == t for t in tasks)
    assert sums[0].id.startswith("chain_sum(max_digits=2,max_terms=3):")
    assert [t.id for t in tasks[1::2]] == [t.id for t in make_tasks("train", 30, only=["chain_sum", "gcd"])[1::2]]


@pytest.mark.parametrize("bad", [{"gcd": {"colour": 3}}, {"gcd": {"min_value": 10, "max_value": 1}}, {"nothing": {"a": 1}}])
def test_impossible_difficulties_are_refused(bad):
    with pytest.raises(DataError, match="difficulty"):
        make_tasks("train", 1, only=["gcd"], difficulty=bad)


@pytest.mark.parametrize("bad", ["gcd", "gcd:x", "nothing:3", "gcd:1000000000"])
def test_other_ids_are_refused(bad):
    with pytest.raises(DataError, match="names no task"):
        task_from_id(bad)


def test_splits_share_no_question_whatever_the_seed():
    prompts = {
        split: {t.prompt for seed in range(3) for t in make_tasks(split, 100, seed)} for split in ("train", "rl", "heldout")
    }
    assert not prompts["train"] & prompts["rl"]
    assert not prompts["train"] & prompts["heldout"]
    assert not prompts["rl"] & prompts["heldout"]


def test_families_come_in_turn_and_no_question_twice():
    tasks = make_tasks("heldout", 50, only=["gcd", "products"])
    assert [t.family for t in tasks] == ["gcd", "products"] * 25
    assert len({t.prompt for t in tasks}) == 50


def test_seeds_draw_other_tasks():
    assert {t.id for t in make_tasks("heldout", 20, 0)} != {t.id for t in make_tasks("heldout", 20, 1)}


def test_the_verifier_takes_the_worked_answer_and_no_other():
    for task in make_tasks("train", 100):
        assert score(task, task.completion) == 1.0
        assert score(task, task.completion + "7") == 0.0
        assert score(task, task.completion.replace("A:", "")) == 0.0
        assert score(task, "") == 0.0


def test_every_step_is_true():
    """Each `=` holds: sums, differences and products by a digit end in `=result`, the others are equations."""
    for task in make_tasks("train", 200):
        for step in task.completion.split("\n")[0].split(";"):
            left, equals, right = step.partition("=")
            if equals and task.family in ("gcd", "base_conversion"):
                assert eval(left) == eval(right), step
            elif equals and task.family == "products":
                assert eval(left.partition(":")[0]) == int(right), step
            elif equals:
                assert abs(eval(left.partition(":")[0])) == abs(int(right)), step


def test_a_chain_ends_at_its_answer():
    for task in make_tasks("train", 60, only=["chain_sum"]):
        assert int(task.completion.split("\n")[0].rpartition("=")[2]) == eval(re.search(r"Q:(\S+)", task.prompt)[1])


@pytest.mark.parametrize("total,term,step", [
    (47, 85, "85+47:12,13=132"), (42, -17, "42-17:-5,2=25"), (-11, 76, "76-11:5,6=65"), (37, -48, "48-37:1,1=-11"),
    (-39, -29, "39+29:18,6=-68"), (0, -12, "12+0:2,1=-12"), (12, -12, "12-12:0,0=0"), (100, -1, "100-1:-1,-1,0=99"),
])  # fmt: skip
def test_columns(total, term, step):
    assert add(total, term) == (step, total + term)


def test_carries():
    assert carry([18, 27]) == "18,28"
    assert carry([-5, 3]) == "-5,2"


def test_unknown_families_and_splits_are_named():
    with pytest.raises(DataError, match="quantum"):
        make_tasks("train", 1, only=["quantum"])
    with pytest.raises(DataError, match="test"):
        make_tasks("test", 1)


def test_the_tokenizer_gives_every_text_back_digit_by_digit():
    tasks = make_tasks("train", 200)
    tokenizer = train_tokenizer((t.prompt + t.completion for t in tasks), 320)
    assert tokenizer.mask_token_id == MASK
    for text in [*(t.prompt + t.completion for t in tasks), "naïve Ω ☃\t\n  x", ""]:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert len(tokenizer.encode("1729", add_special_tokens=False)) == 4
    assert encode_prompt(tokenizer, "17")[0] == tokenizer.bos_token_id
    assert len(families()) >= 4
