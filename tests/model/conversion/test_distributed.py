"""Two processes compute what one does, and one that dies takes the run with it, not the checkpoint."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.multiprocessing as mp
from conversion_parts import curve, recipe

import blockroll
from blockroll.errors import ConfigError
from blockroll.model import vocabulary
from blockroll.model.conversion.checkpoints import Checkpoints
from blockroll.model.conversion.distributed import Group
from blockroll.model.conversion.stage import train_stage
from blockroll.model.conversion.train import run, starting_policy

FEW_ROWS = 320 * 4 * 8 * 30
"""Bytes of logits that make the head compute a pack in several chunks, of which two processes need different numbers."""
TWO = dict(kind="torchrun", workers=2, timeout_s=25)
STAGES = (
    dict(name="ar", kind="ar", tokens=2000, pack_tokens=300, packs_per_step=2, checkpoint_steps=4),
    dict(name="diffusion", kind="diffusion", tokens=4500, pack_tokens=300, packs_per_step=2, checkpoint_steps=4,
         draft=dict(ce=0.5, tv=1.0, slot_decay=0.9)),
)  # fmt: skip
EVERYTHING = dict(
    name="diffusion", kind="diffusion", tokens=3000, pack_tokens=300, packs_per_step=2, checkpoint_steps=4, markov_rank=4,
    ar_target="parent", draft=dict(ce=0.5, tv=1.0, slots="reached", sampled=0.5),
)  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _enter(rank: int, folder: Path, stages: tuple, port: int, die_at: int | None) -> None:
    torch.set_num_threads(1)
    vocabulary.HEAD_BYTES["cpu"] = FEW_ROWS
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    def report(row: dict[str, Any]) -> None:
        if (row["stage"], row["step"]) == ("diffusion", die_at):
            os.kill(os.getpid(), signal.SIGKILL)

    run(recipe(folder, *stages, launcher=TWO), report)


def run_two(folder: Path, *stages: dict[str, Any], die_at: int | None = None) -> list[int | None]:
    """Two processes, forked so that they need not import everything again; returns how they ended."""
    context = mp.get_context("fork")
    port = free_port()
    both = [context.Process(target=_enter, args=(rank, folder, stages, port, die_at)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(timeout=100)
    return [process.exitcode for process in both]


def distance(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    """Largest difference of any figure of two curves of the same steps."""
    return max(abs(a[name] - b[name]) for a, b in zip(one, other, strict=True)
               for name in ("step", "tokens", "learning_rate", "ar_loss", "draft_loss", "overlap"))  # fmt: skip


@pytest.mark.parametrize("diffusion", [
    pytest.param(STAGES[1], id="plain", marks=pytest.mark.slow), pytest.param(EVERYTHING, id="everything"),
])  # fmt: skip
def test_two_processes_equal_one(tmp_path: Path, diffusion: dict[str, Any]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run(recipe(one, STAGES[0], diffusion))
    assert run_two(two, STAGES[0], diffusion) == [0, 0]
    assert len(curve(one)) >= 8
    assert distance(curve(one), curve(two)) < 1e-5
    policies = [blockroll.load_policy(folder / "policy") for folder in (one, two)]
    assert (policies[1].markov is not None) == (diffusion is EVERYTHING)
    for (name, a), b in zip(policies[0].state_dict().items(), policies[1].state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, atol=2e-4, rtol=0, msg=name)


def test_killed_rank_ends_the_run_and_any_number_of_processes_goes_on(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_two(whole, *STAGES) == [0, 0]
    began = time.monotonic()
    ended = run_two(killed, *STAGES, die_at=6)
    assert ended[0] == -signal.SIGKILL and ended[1] not in (0, None)  # the other one did not wait for ever
    assert time.monotonic() - began < 25 + 60
    checkpoints = killed / "policy.diffusion.checkpoints"
    assert (checkpoints / "latest").read_text() == "step-00000004\n"
    saved = {path.relative_to(checkpoints): path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()}
    assert {path.name for path in saved} >= {"__0_0.distcp", "__1_0.distcp"}
    assert run_two(killed, *STAGES) == [0, 0]
    assert curve(killed) == curve(whole)
    assert (killed / "policy" / "model.safetensors").read_bytes() == (whole / "policy" / "model.safetensors").read_bytes()

    alone = tmp_path / "killed_then_alone"
    (alone / "policy.diffusion.checkpoints").mkdir(parents=True)
    for name, data in saved.items():
        path = alone / "policy.diffusion.checkpoints" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    (killed / "policy.ar").rename(alone / "policy.ar")
    (alone / "policy.log.jsonl").write_bytes((killed / "policy.log.jsonl").read_bytes())
    run(recipe(alone, *STAGES))
    assert distance(curve(alone), curve(whole)) < 1e-5


def test_packs_that_cannot_be_shared_are_refused(tmp_path: Path) -> None:
    config, group = recipe(tmp_path, dict(name="ar", kind="ar", tokens=900, packs_per_step=3)), Group(0, 2)
    with pytest.raises(ConfigError, match="3 packs cannot be shared by 2 processes; use a multiple of 2"):
        train_stage(starting_policy(config), config.stages[0], config, Checkpoints(tmp_path, group), tmp_path / "log", group)


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Any]:
    """command(folder, launcher, *words) -> a started `blockroll convert`; whatever it started is ended with the test."""
    started: list[subprocess.Popen] = []

    def start(folder: Path, launcher: dict[str, Any], *words: str) -> subprocess.Popen:
        folder.mkdir(exist_ok=True)
        path = folder / "recipe.yaml"
        # JSON is YAML; a recipe's own types survive it.
        path.write_text(recipe(folder, *STAGES, launcher=launcher).model_dump_json())
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen([sys.executable, "-m", *words, "convert", str(path)], env=environment,
                                        stderr=subprocess.PIPE, text=True, cwd=tmp_path))  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()


TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2", "--master-port")


@pytest.mark.slow
def test_torchrun_and_ray_equal_one_process(command: Any, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    run(recipe(tmp_path / "one", *STAGES))
    assert len(curve(tmp_path / "one")) >= 12
    torchrun = command(tmp_path / "torchrun", TWO, *TORCHRUN, str(free_port()), "-m", "blockroll.cli")
    assert torchrun.wait(timeout=200) == 0, torchrun.stderr.read()
    assert distance(curve(tmp_path / "one"), curve(tmp_path / "torchrun")) < 1e-5
    ray = command(tmp_path / "ray", {**TWO, "kind": "ray"}, "blockroll.cli")
    assert ray.wait(timeout=300) == 0, ray.stderr.read()
    assert curve(tmp_path / "ray") == curve(tmp_path / "torchrun")


@pytest.mark.slow
def test_torchrun_ends_when_a_rank_is_killed_and_goes_on(command: Any, tmp_path: Path) -> None:
    whole = command(tmp_path / "whole", TWO, *TORCHRUN, str(free_port()), "-m", "blockroll.cli")
    assert whole.wait(timeout=200) == 0, whole.stderr.read()
    folder = tmp_path / "killed"
    process = command(folder, TWO, *TORCHRUN, str(free_port()), "-m", "blockroll.cli")
    log, deadline = folder / "policy.log.jsonl", time.monotonic() + 120
    while not log.is_file() or len(log.read_text().splitlines()) < 9:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if "blockroll.cli" in child.cmdline()]
    ranks[1].kill()
    assert process.wait(timeout=60) != 0
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    again = command(folder, TWO, *TORCHRUN, str(free_port()), "-m", "blockroll.cli")
    assert again.wait(timeout=200) == 0, again.stderr.read()
    assert curve(folder) == curve(tmp_path / "whole")
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [row["step"] for row in curve(folder)]


@pytest.mark.slow
def test_ray_reports_what_a_worker_was_refused_and_a_lost_worker(command: Any, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "policy.ar.checkpoints").mkdir()
    (tmp_path / "bad" / "policy.ar.checkpoints" / "latest").write_text("step-00000004\n")
    refused = command(tmp_path / "bad", {**TWO, "kind": "ray"}, "blockroll.cli")
    assert refused.wait(timeout=200) == 2
    last = refused.stderr.read().strip().splitlines()[-1]
    assert last.startswith("error: checkpoint: ") and "cannot be resumed" in last
