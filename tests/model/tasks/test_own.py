"""Tasks of one's own: rows of every kind of file, prompts of every kind, splits, epochs, rewards; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from blockroll.errors import InvalidInput
from blockroll.model.checkpoint import load_policy
from blockroll.model.policy import Policy
from blockroll.model.tasks.own import OwnTasks
from blockroll.model.tasks.own_config import TaskSource
from blockroll.model.tasks.task_set import Answer
from blockroll.settings import parse

REWARDS = """
def length(completions, answer, **others):
    return [len(text) + right for text, right in zip(completions, answer)]

def seen(completions, prompts, completion_ids, finish_reasons, level=None):
    global last
    last = [prompts, completions, completion_ids, finish_reasons, level]
    raise ValueError(repr(last))

def one(completion, answer):
    return float(completion == str(answer))

def ids(completion_ids):
    return [len(tokens) for tokens in completion_ids]

def nothing(completions):
    return [None] * len(completions)

def weighs(completion, weight=3):
    return weight

def blind(answer):
    return answer

def wants(completions, colour):
    return colour
"""
CHAT = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
LENGTH = {"function": "own_rewards:length"}


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy("tiny-reasoner")


@pytest.fixture
def own(tmp_path: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., OwnTasks]]:
    """own(rows, **section) -> the tasks of a JSONL file with these rows; closed after the test."""
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    made: list[OwnTasks] = []

    def make(rows: list[Any] | None, prompts_per_step: int = 0, **section: Any) -> OwnTasks:
        if rows is not None:
            Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {"paths": ["rows.jsonl"], "reward": {"function": "own_rewards:length"}, **section}
        made.append(OwnTasks(parse(values, TaskSource, "test"), policy, prompts_per_step=prompts_per_step))
        return made[-1]

    yield make
    for each in made:
        each.close()


def rows(count: int, **others: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"Q:{i}+1\nS:", "answer": i + 1, **others} for i in range(count)]


def said(text: str, finish_reason: str = "stop") -> Answer:
    return Answer(text, tuple(range(len(text))), finish_reason)


def test_files_of_every_kind_hold_the_same_tasks(own: Callable[..., OwnTasks], policy: Policy) -> None:
    table = rows(40)
    wanted = own(table)
    Path("more").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), "more/rows.parquet")
    saved = datasets.Dataset.from_list(table)
    saved.save_to_disk("saved")
    datasets.DatasetDict({"train": saved, "test": saved.select(range(5))}).save_to_disk("splits")
    sections = [{"paths": ["more"]}, {"paths": ["more/*.parquet"]}, {"paths": ["saved"]}, {"paths": ["splits"], "split": "train"}]
    for section in sections:
        found = own(None, **section)
        assert [task.id for task in found.training] == [task.id for task in wanted.training]
        assert [task.id for task in found.heldout(100, 0)] == [task.id for task in wanted.heldout(100, 0)]
        assert found.score([(found.training[0], said("ab"))]) == wanted.score([(wanted.training[0], said("ab"))])
    Path("test.jsonl").write_text("".join(json.dumps({**row, "prompt": f"other {i}"}) + "\n" for i, row in enumerate(table[:5])))
    apart = own(None, heldout_paths=["test.jsonl"])
    assert len(apart.training) == 40 and len(apart.heldout(100, 0)) == 5


def test_prompts_are_text_token_ids_or_chats(
    own: Callable[..., OwnTasks], policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy.tokenizer, "chat_template", CHAT)
    chat = [{"role": "user", "content": "1+1"}]
    given = ["Q:1+1\nS:", [1, 20, 30], chat]
    tasks = own([{"question": prompt, "level": i} for i, prompt in enumerate(given)] * 2, prompt="question", heldout_share=1.0,
                reward={"function": "own_rewards:seen"}).heldout(9, 0)  # fmt: skip
    by_level = sorted(tasks, key=lambda task: (task.row["level"], task.id))
    assert [task.tokens for task in by_level[::2]] == [
        (1, *policy.tokenizer.encode("Q:1+1\nS:")), (1, 20, 30), tuple(policy.tokenizer.encode("u:1+1;a:"))]  # fmt: skip
    assert len({task.id for task in tasks}) == 6  # the same prompt twice is two tasks
    with pytest.raises(InvalidInput) as caught:
        own(None, prompt="question", heldout_share=1.0, reward={"function": "own_rewards:seen"}).score(
            [(task, said("xy", "length")) for task in by_level[::2]])  # fmt: skip
    wanted = [given, ["xy", "xy", [{"role": "assistant", "content": "xy"}]], [[0, 1]] * 3, ["length"] * 3, [0, 1, 2]]
    assert repr(wanted)[:200] in str(caught.value)


def test_an_epoch_uses_every_row_once_and_splits_share_no_prompt(own: Callable[..., OwnTasks]) -> None:
    tasks = own(rows(200))
    training, heldout = {task.id for task in tasks.training}, {task.id for task in tasks.heldout(1000, 0)}
    assert not training & heldout and len(training) + len(heldout) == 200 and 8 < len(heldout) < 35
    drawn = [task.id for number in range(len(training)) for task in tasks.draw(number, 4, number)]
    for epoch in range(4):
        assert set(drawn[epoch * len(training) : (epoch + 1) * len(training)]) == training
    assert drawn[: len(training)] != drawn[len(training) : 2 * len(training)]
    assert [task.id for task in tasks.draw(7, 4, 0)] == drawn[28:32]
    half = {task.id for task in tasks.heldout(5, 0)}
    assert len(half) == 5 and half < heldout and half != {task.id for task in tasks.heldout(5, 1)}
    # A row keeps its side where rows are added, and the digest tells that they were.
    more = own(rows(230))
    assert training <= {task.id for task in more.training} and more.digest != tasks.digest == own(rows(200)).digest


def test_rewards(own: Callable[..., OwnTasks]) -> None:
    tasks = own(rows(30))
    pairs = [(task, said("ab")) for task in tasks.training[:3]]
    assert tasks.score(pairs) == [2.0 + task.row["answer"] for task, _ in pairs]
    one = own(rows(30), reward={"function": "own_rewards:one", "batched": False})
    task = one.training[0]
    assert one.score([(task, said(str(task.row["answer"]))), (task, said("no"))]) == [1.0, 0.0]
    assert own(rows(30), reward={"function": "own_rewards:ids"}).score([(task, said("abc"))]) == [3.0]
    weighed = own([*rows(20), *({"prompt": str(i), "weight": 2} for i in range(20))],
                  reward={"function": "own_rewards:weighs", "batched": False})  # fmt: skip
    found = weighed.score([(task, said("a")) for task in weighed.training])
    assert found == [task.row.get("weight", 3) for task in weighed.training] and set(found) == {2.0, 3.0}
    with pytest.raises(InvalidInput, match="none of 2 samples was given a reward but None"):
        own(rows(30), reward={"function": "own_rewards:nothing"}).score([(task, said("a"))] * 2)


@pytest.mark.parametrize("kind, after, gold, right, wrong", [
    ("exact", None, 12, [" 12 ", "12"], ["12.0", "A:12", "", "1 2"]),
    ("exact", "A:", "a b", ["steps\nA: a b", "A:c\nA:a b"], ["a b", "A:a b c", "A:"]),
    ("math", None, "\\frac{1}{2}", ["0.5", "so it is \\boxed{1/2}", "$\\frac{2}{4}$"], ["0.51", "", "none", "((((", "\\frac{1"]),
    ("math", "A:", "x^2+1", ["A:$1+x^2$"], ["$1+x^2$", "A:$x^2-1$", "A:"]),
    ("math", None, 7, ["7", "$7.0$"], ["8", "9**9**9**9**9 and $9^{9^{9^9}}$"]),
])  # fmt: skip
def test_matches(
    own: Callable[..., OwnTasks], kind: str, after: str | None, gold: Any, right: list[str], wrong: list[str]
) -> None:
    table = [{"prompt": f"q{i}", "gold": gold} for i in range(3)]
    reward = {"match": kind, "field": "gold", "timeout_s": 2.0, **({"after": after} if after else {})}
    tasks = own(table, heldout_share=1.0, reward=reward)
    task = tasks.heldout(1, 0)[0]
    found = tasks.score([(task, said(text)) for text in (*right, *wrong)])
    assert [value or 0.0 for value in found] == [1.0] * len(right) + [0.0] * len(wrong)
    assert tasks.score([(task, said(right[0], "length")), (task, said(right[0]))]) == [0.0, 1.0]


GOOD = rows(30)
BAD: list[tuple[str, list[Any] | str | None, Mapping[str, Any], tuple[str, ...]]] = [
    ("a prompt is missing", [*GOOD, {"answer": 1}], {}, ("rows.jsonl line 31", "'prompt'", "'answer'")),
    ("a prompt is null", [*GOOD, {"prompt": None}], {}, ("line 31", "'prompt'")),
    ("a prompt is empty", [{"prompt": ""}], {}, ("line 1", "is empty")),
    ("a prompt is a number", [{"prompt": 3}], {}, ("line 1", "3 is no prompt")),
    ("a prompt is an empty list", [{"prompt": []}], {}, ("line 1", "is empty")),
    ("a prompt mixes ids and text", [{"prompt": [1, "a"]}], {}, ("line 1", "'a'", "token id")),
    ("an id is true", [{"prompt": [True]}], {}, ("line 1", "True")),
    ("an id is negative", [{"prompt": [-1]}], {}, ("line 1", "-1")),
    ("an id is beyond the vocabulary", [{"prompt": [10**6]}], {}, ("line 1", "1000000", "vocabulary")),
    ("a prompt is too long", [{"prompt": "7" * 600}], {}, ("line 1", "601 tokens", "512")),
    ("a chat without a template", [{"prompt": [{"role": "user", "content": "a"}]}], {}, ("line 1", "no chat template")),
    ("another field is named", GOOD, {"prompt": "question"}, ("line 1", "'question'", "tasks.source")),
    ("no rows", [], {}, ("rows.jsonl", "holds no rows")),
    ("a line is no object", "[1]\n", {}, ("rows.jsonl line 1", "array")),
    ("a line is no JSON", "{", {}, ("rows.jsonl line 1", "not valid JSON")),
    ("a file is not there", GOOD, {"paths": ["nowhere.jsonl"]}, ("nowhere.jsonl", "no such file")),
    ("a file of another kind", GOOD, {"paths": ["own_rewards.py"]}, ("own_rewards.py",)),
    ("a split of a file", GOOD, {"split": "train"}, ("'train'", "rows.jsonl")),
    ("a held-out prompt is trained on", GOOD, {"heldout_paths": ["rows.jsonl"]}, ("line 1", "is also that of", "trained on")),
    ("nothing is held out", GOOD[:1], {"heldout_share": 1e-9}, ("none of 1 rows is held out", "heldout_share")),
    ("a step wants more than there is", GOOD, {"prompts_per_step": 100}, ("tasks.prompts_per_step", "100")),
    ("a field that the function wants", GOOD, {"reward": {"function": "own_rewards:wants"}}, ("line ", "'colour'", "known here")),
    ("in a later row", [*GOOD, {"prompt": "a"}], {"reward": {"function": "own_rewards:one", "batched": False}},
     ("line 31", "'answer'")),
    ("no parameter for what was written", GOOD, {"reward": {"function": "own_rewards:blind"}}, ("completions",)),
    ("singular in a batch", GOOD, {"reward": {"function": "own_rewards:one"}}, ("'completion'", "own_rewards:one")),
    ("a field with blockroll's name", rows(30, completions=1), {}, ("'completions'", "rename")),
    ("a gold is missing", [*GOOD, {"prompt": "a"}], {"reward": {"match": "exact"}}, ("line 31", "'answer'")),
    ("a gold is a list", [*GOOD, {"prompt": "a", "answer": [1]}], {"reward": {"match": "exact"}}, ("line 31", "'answer'", "[1]")),
    ("a gold is no value", [*GOOD, {"prompt": "a", "answer": "?!"}], {"reward": {"match": "math"}}, ("no value", "'?!'")),
    ("a family is a number", GOOD, {"family": "answer"}, ("line 1", "'answer'", "1 is no text")),
    ("a completion is missing", GOOD, {"completion": "worked"}, ("line 1", "'worked'")),
    ("no paths", GOOD, {"paths": []}, ("paths",)),
    ("two ways to hold out", GOOD, {"heldout_share": 0.5, "heldout_paths": ["x"]}, ("heldout_share", "heldout_paths")),
    ("neither function nor match", GOOD, {"reward": {}}, ("reward.function", "neither")),
    ("both", GOOD, {"reward": {**LENGTH, "match": "exact"}}, ("reward.function", "match: exact")),
    ("a function without a module", GOOD, {"reward": {"function": "length"}}, ("'length'", "module:function")),
    ("a path as a module", GOOD, {"reward": {"function": "a/b.py:length"}}, ("a/b.py", "module:function")),
    ("a mark beside a function", GOOD, {"reward": {**LENGTH, "after": "A:"}}, ("reward.after", "function")),
    ("a match of another kind", GOOD, {"reward": {"match": "fuzzy"}}, ("reward.match", "fuzzy")),
    ("a timeout of nothing", GOOD, {"reward": {**LENGTH, "timeout_s": 0}}, ("reward.timeout_s", "0")),
    ("an unknown key", GOOD, {"rewards": LENGTH}, ("rewards", "reward")),
]


@pytest.mark.parametrize("table, section, says", [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_what_is_refused(own: Callable[..., OwnTasks], table: Any, section: Mapping[str, Any], says: tuple[str, ...]) -> None:
    if isinstance(table, str):
        Path("rows.jsonl").write_text(table)
        table = None
    with pytest.raises(InvalidInput) as caught:
        own(table, **section)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    for word in says:
        assert word in message, (word, message)
