"""Small real runs of `blockroll grpo`, from config to summary: Ray actors, sockets, ledger, trainer and the shipped policy."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from blockroll import cli
from blockroll.errors import ConfigError
from blockroll.settings import load_yaml
from blockroll.trainer_bridge.trainers.grpo.config import GrpoConfig
from blockroll.trainer_bridge.trainers.grpo.metrics import read_rows
from blockroll.trainer_bridge.trainers.grpo.report import Display

RUN = """
output: {output}
policy: tiny-reasoner-terse
steps: 3
tasks: {{families: [products, chain_sum], prompts_per_step: 5, samples_per_prompt: 4, max_generation_batches: {batches}}}
rollouts: {{max_tokens: 64, staleness: {staleness}}}
service: {{engines: {{count: {engines}, batch: 16}}, schedule: {{kind: fused}}}}
evaluation: {{tasks: 6, every: 2}}
save_policy: false
"""
COMMAND = [sys.executable, "-c", "from blockroll.cli import main; main()", "grpo"]


def write_config(path: Path, output: Path, staleness: int = 0, batches: int = 1, engines: int = 2) -> Path:
    path.write_text(RUN.format(output=output, staleness=staleness, batches=batches, engines=engines))
    return path


def run(config: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, str(config), *flags], capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """said(status, config, *flags): runs the command in this process, where it must end so; returns the lines of its stderr."""

    def run(status: int, config: Path, *flags: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["blockroll", "grpo", str(config), *flags])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        lines = capsys.readouterr().err.splitlines()
        assert (ended.value.code or 0) == status, lines
        return lines

    return run


def rollouts_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "rollouts.jsonl").read_text().splitlines()]


def files_of(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()}


def test_unknown_key_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("output: x\nstepz: 3\n")
    with pytest.raises(ConfigError, match=r"stepz.*steps"):
        load_yaml(path, GrpoConfig)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The directory of a run that nothing disturbed."""
    place = tmp_path_factory.mktemp("whole")
    done = run(write_config(place / "run.yaml", place / "run"))
    assert done.returncode == 0, done.stderr[-2000:]
    return place / "run"


def test_a_run_writes_what_it_came_to(whole):
    summary = json.loads((whole / "summary.json").read_text())
    asked = 3 * 5 * 4 + 3 * 2 * 6  # steps; evaluations before, after step 2 and at the end
    assert summary["trajectories"] == {"requested": asked, "unique": asked, "duplicates": 0, "missing": 0}
    assert summary["final_weight_version"] == summary["steps"] == 3
    rows = read_rows(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert ["heldout_greedy" in row for row in rows] == [True, False, True, True]
    assert summary["heldout_greedy_before"] == rows[0]["heldout_greedy"]
    assert summary["heldout_accuracy_after"] == rows[3]["heldout_accuracy"]
    assert 0 < summary["groups_used"] <= summary["groups"] == 15
    assert any(row["gradient_norm"] for row in rows[1:])
    assert all(row["ratio"] is None or abs(row["ratio"] - 1) < 0.02 for row in rows[1:])
    logged = rollouts_of(whole)
    assert [line["step"] for line in logged] == [step for step in (1, 2, 3) for _ in range(4 * 4)]  # four groups of four
    for step in (1, 2, 3):
        of_step = [line for line in logged if line["step"] == step]
        rewards = [line["reward"] for line in of_step]
        assert all(line["versions"] == [step - 1] * len(line["tokens"]) for line in of_step)
        assert abs(sum(line["advantage"] for line in of_step)) < 1e-6 and 0 <= min(rewards) <= max(rewards) <= 1
    assert (whole / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_line_says_which_step_of_how_many_it_is(capsys):
    row = {"step": 2, "reward": 0.5, "groups_used": 3, "groups": 4, "tokens_per_s": 10.0, "tokens_per_forward": 3.0,
           "weight_version": 2}
    Display(GrpoConfig(output="run", steps=3)).row(row)
    assert capsys.readouterr().err.startswith("step 2/3  reward 0.500")


def test_a_finished_run_is_not_overwritten_unasked(whole, said):
    before = files_of(whole)
    assert said(2, whole.parent / "run.yaml")[-1] == (
        f"error: output: {whole} holds a run (config.yaml); go on with it (--resume), replace it (--overwrite) or give "
        "another directory"
    )
    for changed, field in (("delivery: {bind: 'tcp://nowhere'}", "service.delivery.bind"),
                           ("ray: {address: '127.0.0.1:9'}", "ray")):  # fmt: skip
        bad = write_config(whole.parent / "bad.yaml", whole)
        bad.write_text(bad.read_text().replace("schedule: {kind: fused}", changed))
        assert said(2, bad, "--overwrite")[-1].startswith(f"error: {field}: ")
        assert files_of(whole) == before
    assert said(0, whole.parent / "run.yaml", "--resume") == [f"the run in {whole} is finished"]
    assert files_of(whole) == before


def test_another_configuration_is_not_resumed(whole, said, tmp_path):
    other = write_config(tmp_path / "other.yaml", whole)
    other.write_text(other.read_text().replace("steps: 3", "steps: 4"))
    refusal = said(2, other, "--resume")[-1]
    assert refusal.startswith(f"error: steps: 4 in {other} differs from the run in {whole}, which has 3; ")


def kill(process: subprocess.Popen, mark: str) -> None:
    """Kill -9 a run, then whatever of its service is left."""
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for left in psutil.process_iter(["environ"]):
        if (left.info["environ"] or {}).get("BLOCKROLL_TEST_RUN") == mark:
            left.kill()


@pytest.mark.parametrize("kills", [
    pytest.param([(2, 0.15)], id="after a step"),
    pytest.param([(1, 0.3), (3, 0.15)], id="in the first step and after two", marks=pytest.mark.slow),
])
def test_a_run_that_is_killed_goes_on_to_the_same_trajectories(whole, tmp_path, kills):
    """Each kill: rows of metrics, and seconds after the last of them. One engine has the work of two.

    In the first step there is no checkpoint.
    """
    output = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", output, engines=1)
    for number, (rows, wait) in enumerate(kills):
        flags = ("--resume",) if number else ()
        with open(tmp_path / "stderr", "w") as stderr:
            environment = os.environ | {"BLOCKROLL_TEST_RUN": str(output)}
            process = subprocess.Popen([*COMMAND, str(config), *flags], stderr=stderr, env=environment)
        while len(read_rows(output / "metrics.jsonl")) < rows:
            assert process.poll() is None, (tmp_path / "stderr").read_text()
            time.sleep(0.02)
        time.sleep(wait)
        kill(process, str(output))
        assert not (output / "summary.json").exists()
    done = run(config, "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = (read_rows(d / "metrics.jsonl") for d in (output, whole))
    same = ("step", "trajectories_digest", "kl", "heldout_accuracy", "heldout_greedy")
    assert [[row.get(key) for key in same] for row in ours] == [[row.get(key) for key in same] for row in theirs]
    same = ("id", "sample", "step", "reward", "advantage", "tokens", "logprobs", "versions")  # drafts depend on the batch
    ours, theirs = rollouts_of(output), rollouts_of(whole)
    assert [[line[key] for key in same] for line in ours] == [[line[key] for key in same] for line in theirs]
    counts = json.loads((output / "summary.json").read_text())["trajectories"]
    assert counts["requested"] == counts["unique"] == 96 and counts["missing"] == 0


@pytest.mark.slow
def test_one_step_off_policy_with_more_than_one_batch_of_prompts(tmp_path):
    config = write_config(tmp_path / "run.yaml", tmp_path / "run", staleness=1, batches=2)
    done = run(config)
    assert done.returncode == 0, done.stderr[-2000:]
    summary, rows = json.loads((tmp_path / "run/summary.json").read_text()), read_rows(tmp_path / "run/metrics.jsonl")
    assert summary["trajectories"]["missing"] == 0 and summary["final_weight_version"] == 3
    assert rows[1]["staleness"] == 0 and 0 <= rows[2]["staleness"] <= 1 and 0 <= rows[3]["staleness"] <= 1
    assert max(rows[2]["staleness"], rows[3]["staleness"]) > 0
    assert all(row["groups"] == 10 or row["groups_used"] == 5 for row in rows[1:])
