"""The command line itself: help at once, and one line with a status for everything a user can cause."""

from __future__ import annotations

import errno
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

import blockroll.rollout
from blockroll import cli
from blockroll.errors import ConfigError

COMMANDS = [("grpo",), ("convert",), ("generate",), ("score",), ("bench", "decode")]


def blockroll_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = "import sys; from blockroll.cli import main; sys.argv[0] = 'blockroll'; main()"
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120)


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["blockroll", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code if isinstance(ended.value.code, int) else 1


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """`blockroll score` raises what the list holds."""
    errors: list[BaseException] = []

    def fail(*_: object, **__: object) -> None:
        raise errors[0]

    offline = ModuleType("blockroll.rollout.offline")
    offline.score_file = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "blockroll.rollout.offline", offline)
    monkeypatch.setattr(blockroll.rollout, "offline", offline, raising=False)
    return errors


SCORE = ("score", "--policy", "p", "--input", "i", "--output", "o")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_shows_an_example_of_the_command(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, *command, "--help") == 0
    _, _, example = capsys.readouterr().out.partition("Example:")
    assert f"blockroll {' '.join(command)} " in example


@pytest.mark.parametrize("command", [(), ("grpo",), ("bench", "decode")], ids=" ".join)
def test_help_has_a_short_name(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, *command, "-h") == 0
    assert "Usage:" in capsys.readouterr().out


def test_help_answers_at_once() -> None:
    start = time.perf_counter()
    done = blockroll_command("--help")
    assert done.returncode == 0
    assert time.perf_counter() - start < 5, "something heavy is imported before a command runs"
    assert {"grpo", "convert", "generate", "score", "bench"} <= set(done.stdout.split())


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"blockroll {blockroll.__version__}\n"


class Wrapped(Exception):
    """As an error out of a Ray task: a long text, and the cause beside it."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("Traceback (most recent call last):\n  ...")
        self.cause = cause


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (ConfigError("steps", "unknown key in a.yaml", "did you\nmean `step`?"),
         "error: steps: unknown key in a.yaml; did you mean `step`?\n"),
        (Wrapped(ConfigError("a", "b", "c")), "error: a: b; c\n"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"),
         "error: runs/x: the disk is full; free some space or write to another disk, then run again\n"),
    ],
)
def test_what_a_user_can_cause_is_one_line(
    failing: list[BaseException], raised: Exception, said: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    failing.append(raised)
    assert run_main(monkeypatch, *SCORE) == 2
    assert capsys.readouterr().err == said


def test_a_bug_keeps_its_traceback(failing: list[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    failing.append(KeyError("ours"))
    monkeypatch.setattr(sys, "argv", ["blockroll", *SCORE])
    with pytest.raises(KeyError, match="ours"):
        cli.main()


def test_interrupt_exits_with_130(failing: list[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    failing.append(KeyboardInterrupt())
    assert run_main(monkeypatch, *SCORE) == 130


FILES = "--input none --output out.jsonl"
TAKE_A_POLICY = [f"generate {FILES}", f"score {FILES}", "eval", "sample --prompt a", "tradeoff", "bench decode", "bench planner"]


@pytest.mark.parametrize("command", TAKE_A_POLICY)
def test_a_policy_is_named_by_its_place_or_by_an_option(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for more, said in {"": "policy: none given; name a shipped policy", "nobody": "policy: 'nobody' is no directory",
                       "--policy nobody": "policy: 'nobody' is no directory",
                       "nobody --policy body": "policy: 'nobody' and --policy 'body' given; give one of the two"}.items():
        assert run_main(monkeypatch, *shlex.split(f"{command} {more}")) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {said}") and err.count("\n") == 1, err


BAD_OPTIONS = {
    "generate --policy tiny-reasoner --input none --output out.jsonl": {
        "--sampler best": "sampler: unknown sampler 'best'; use one of ar, lossless, coupled, mixed",
        "--levels 0,x": "levels: '0,x' is not a list of whole numbers; write them like 0,4,8",
        "--top-p 0": "top_p: 0.0 is outside (0, 1]; use 1.0 to keep every token",
        "--schedule best": "schedule: unknown schedule 'best'; use one of auto, ar, two_pass, fused",
        "--policy nobody": "policy: 'nobody' is no directory with a config.json",
        "--top-k -2": "top_k: -2 is no whole number in -1..2147483647; use 0 or -1 to keep every token",
        "--n 0": "n: 0 is less than 1",
        "--batch 0": "batch: 0 is less than 1",
        "--block-size 1": "block_size: 1 is outside 2..64",
        "--seed -1": "seed: -1 is outside 0..2**63-1",
    },
    "bench decode --policy tiny-reasoner": {
        "--peer nobody": "peer: unknown peer 'nobody'; use one of transformers, transformers-lookup, ",
        "--schedule best": "schedule: unknown schedule 'best'; use one of auto, ar, two_pass, fused",
        "--samplers best": "sampler: unknown sampler 'best'",
        "--batch 0": "batch: 0 is less than 1",
        "--batch ''": "batch: 0 is less than 1",
        "--rounds 2": "rounds: 2 is less than 3",
        "--batch x": "batch: 'x' is not a list of whole numbers",
    },
    "bench planner --policy tiny-reasoner": {
        "--rounds 2": "rounds: 2 is less than 3",
        "--batch 0": "batch: 0 is less than 1",
    },
}
"""By command: options, and how the line that refuses them begins."""


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [(command, options, said) for command, table in BAD_OPTIONS.items() for options, said in table.items()],
)
def test_bad_options(
    command: str, options: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code = run_main(monkeypatch, *shlex.split(f"{command} {options}"))
    err = capsys.readouterr().err
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith(f"error: {said}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["grpo", "convert"])
def test_configs_name_key_and_file(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("outputt: x\n")
    assert run_main(monkeypatch, command, str(config)) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: outputt: unknown key in {config}; did you mean `output`?")
    assert err.count("\n") == 1
    assert run_main(monkeypatch, command, str(tmp_path / "none.yaml")) == 2
    assert "cannot be read (No such file or directory)" in capsys.readouterr().err
