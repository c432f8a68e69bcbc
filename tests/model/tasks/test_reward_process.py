"""Reward functions in a process of their own: values, errors in one line, and what takes too long."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from blockroll.errors import ConfigError, DataError
from blockroll.model.tasks.reward_process import RewardProcess

MODULE = """
import asyncio, os, subprocess, time
import numpy as np

def lengths(completions, **others):
    print("a line of the function's own")
    return [float(len(text)) for text in completions]

async def later(completions):
    await asyncio.sleep(0.01)
    return [None if text == "?" else 1 for text in completions]

def length(completion):
    return len(completion)

async def waits(completion, wait=0.0):
    await asyncio.sleep(wait)
    return 1.0

def sleeps(completion, wait=0.0):
    time.sleep(wait)
    return 1.0

async def blocks(completion, wait=0.0):
    time.sleep(wait)
    await asyncio.sleep(0.01)
    return 1.0

def runs(completion):
    sleeper = subprocess.Popen(["sleep", "60"])
    open(completion, "w").write(str(sleeper.pid))
    sleeper.wait()

def never(completions):
    while True:
        pass

def grows(completions):
    return [9 ** 9 ** 9 ** 9]  # one operation, which holds the interpreter for ever

def array(completions):
    return np.arange(len(completions), dtype=np.float32)

def lists(completions, returned):
    return eval(returned[0])

def one(completion, returned):
    return eval(returned)

def raises(completions):
    raise KeyError("nothing\\nof the kind")

def exits(completions):
    raise SystemExit(3)

def dies(completions):
    os._exit(7)

def positional(completions, /):
    return []

class Judge:
    def __call__(self, completions):
        return [0.5] * len(completions)

    @staticmethod
    def method(completions):
        return [0.25] * len(completions)

judge, number = Judge(), 3
"""


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RewardProcess]]:
    """process(name, timeout) -> the process of a function of MODULE, ended after the test."""
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("import nothing_of_the_kind\n")
    (tmp_path / "wrong_rewards.py").write_text("1 +\n")
    monkeypatch.chdir(tmp_path)
    made: list[RewardProcess] = []

    def start(name: str, timeout: float = 20.0) -> RewardProcess:
        made.append(RewardProcess(f"my_rewards:{name}" if ":" not in name else name, timeout))
        return made[-1]

    yield start
    for each in made:
        each.close()


def test_values_of_a_batch(process: Callable[..., RewardProcess], capfd: pytest.CaptureFixture[str]) -> None:
    lengths = process("lengths")
    parameters = lengths.start()
    assert dict(parameters.named) == {"completions": False} and parameters.any_name
    assert lengths.batch({"completions": ["a", "bcd"], "answer": [1, 2]}, 2) == [1.0, 3.0]
    assert lengths.batch({"completions": ["\u20ac" * 100_000], "answer": [1]}, 1) == [100_000.0]
    assert "function's own" not in capfd.readouterr().out
    assert process("later").batch({"completions": ["a", "?"]}, 2) == [1.0, None]
    assert process("array").batch({"completions": ["a", "b"]}, 2) == [0.0, 1.0]
    assert process("judge").batch({"completions": ["a"]}, 1) == [0.5]
    assert process("Judge.method").batch({"completions": ["a"]}, 1) == [0.25]


def test_values_one_at_a_time(process: Callable[..., RewardProcess]) -> None:
    assert process("length").each([{"completion": "a" * n} for n in (3, 0, 5)]) == [3.0, 0.0, 5.0]
    began = time.monotonic()
    assert process("waits").each([{"completion": "a", "wait": 0.5} for _ in range(40)]) == [1.0] * 40
    assert time.monotonic() - began < 10  # they wait side by side


def test_what_takes_too_long_has_no_value_and_leaves_the_others_theirs(process: Callable[..., RewardProcess]) -> None:
    sleeps = process("sleeps", 0.2)
    calls = [{"completion": "a", "wait": wait} for wait in (0, 60, 0, 60, 0)]
    assert sleeps.each(calls) == [1.0, None, 1.0, None, 1.0] and sleeps.late == 2
    waits = process("waits", 0.3)
    assert waits.each(calls) == [1.0, None, 1.0, None, 1.0] and waits.late == 2


def test_a_coroutine_that_blocks_leaves_the_others_their_values(process: Callable[..., RewardProcess]) -> None:
    """It blocks those that run beside it too; they are called again."""
    blocks = process("blocks", 0.3)
    assert blocks.each([{"completion": "a", "wait": wait} for wait in (0, 0, 0, 60, 0)]) == [1.0, 1.0, 1.0, None, 1.0]
    assert blocks.late == 1


def test_what_a_function_has_started_ends_with_it(process: Callable[..., RewardProcess], tmp_path: Path) -> None:
    runs = process("runs", 0.5)
    assert runs.each([{"completion": str(tmp_path / "pid")}]) == [None]
    assert not alive(int((tmp_path / "pid").read_text()))


def alive(pid: int) -> bool:
    """Whether a process runs, 2 s from now at the latest."""
    try:
        psutil.Process(pid).wait(timeout=2)
    except psutil.NoSuchProcess:
        return False
    except psutil.TimeoutExpired:
        return True
    return False


@pytest.mark.parametrize("name", ["never", "grows"])
def test_a_function_that_never_returns_is_ended(process: Callable[..., RewardProcess], name: str) -> None:
    endless = process(name, 0.2)
    assert endless.batch({"completions": ["a", "b"]}, 2) == [None, None]
    assert endless.late == 1


@pytest.mark.parametrize("returned, says", [
    ("[1.0]", "1 values for 2 samples"), ("[1.0, 2.0, 3.0]", "3 values for 2 samples"), ("1.0", "float 1.0, no list"),
    ("None", "no list"), ("'ab'", "no list"), ("{0: 1.0, 1: 2.0}", "no list"), ("[1.0, float('nan')]", "returned nan"),
    ("[float('inf'), 1.0]", "returned inf"), ("[1.0, '1']", "str '1', no number at place 1"), ("[[1.0], [1.0]]", "no number"),
    ("[1j, 1.0]", "no number"), ("[1.0, 10**400]", "OverflowError"), ("[x for x in 1]", "TypeError"),
])  # fmt: skip
def test_what_is_no_reward_is_an_error(process: Callable[..., RewardProcess], returned: str, says: str) -> None:
    with pytest.raises(DataError) as caught:
        process("lists").batch({"completions": ["a", "b"], "returned": [returned, returned]}, 2)
    assert says in str(caught.value) and "\n" not in str(caught.value) and "my_rewards:lists" in str(caught.value)


@pytest.mark.parametrize("returned, says", [("'1'", "no number"), ("[1.0]", "no number"), ("float('nan')", "returned nan")])
def test_what_is_no_reward_of_one_sample_is_an_error(process: Callable[..., RewardProcess], returned: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        process("one").each([{"completion": "a", "returned": "1.0"}, {"completion": "a", "returned": returned}])


@pytest.mark.parametrize("name, says", [
    ("raises", "KeyError: 'nothing"), ("exits", "SystemExit: 3"), ("dies", "ended its process (status 7)"),
])  # fmt: skip
def test_what_a_function_raises_is_an_error_with_its_place(process: Callable[..., RewardProcess], name: str, says: str) -> None:
    with pytest.raises(DataError) as caught:
        process(name).batch({"completions": ["a"]}, 1)
    message = str(caught.value)
    assert says in message and "\n" not in message and (name == "dies" or "my_rewards.py line" in message)


@pytest.mark.parametrize("name, says", [
    ("nowhere:reward", "there is no module 'nowhere'"), ("nowhere.at.all:reward", "there is no module 'nowhere'"),
    ("my_rewards:nothing", "has no 'nothing'"), ("my_rewards:number", "no function but of type int"),
    ("my_rewards:positional", "'completions' has no name"), ("broken_rewards:reward", "nothing_of_the_kind"),
    ("wrong_rewards:reward", "SyntaxError"), ("test:reward", "has no 'reward'"),
])  # fmt: skip
def test_a_function_that_cannot_be_used_is_refused(process: Callable[..., RewardProcess], name: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        process(name).start()
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_process_ends_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(MODULE)
    program = "from blockroll.model.tasks.reward_process import RewardProcess\nimport time\n" \
              "p = RewardProcess('my_rewards:never', 60)\np.start()\nprint(p._process.pid, flush=True)\n" \
              "p._send({'arguments': {'completions': []}})\ntime.sleep(60)\n"
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=os.environ)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    time.sleep(0.2)  # it is in the function
    parent.kill()
    parent.wait()
    child.wait(timeout=20)
