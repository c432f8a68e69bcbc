"""Two processes compute what one does, and one that dies takes the run with it, not the checkpoint."""

from __future__ import annotations

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
    name="diffusion", kind="diffusion", tokens=4800, pack_tokens=300, packs_per_step=4, checkpoint_steps=4, markov_rank=4,
    ar_target="parent", draft=dict(ce=0.5, tv=1.0, slots="reached", sampled=0.5), activation_checkpointing=True,
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


TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2", "--master-port")
LONGER = (STAGES[0], dict(STAGES[1], tokens=9000))


class Commands:
    """`blockroll convert` in processes of its own; what was started is ended with `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._started = folder, list[subprocess.Popen]()

    def start(self, name: str, kind: str) -> subprocess.Popen:
        """Convert into the folder `name`, under torchrun or on Ray."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        path = folder / "recipe.yaml"
        # JSON is YAML; a recipe's own types survive it.
        path.write_text(recipe(folder, *LONGER, launcher={**TWO, "kind": kind}).model_dump_json())
        words = ("blockroll.cli",) if kind == "ray" else (*TORCHRUN, str(free_port()), "-m", "blockroll.cli")
        # Ray's workers step back by 15 unless told otherwise, which on a busy machine is for minutes.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
        self._started.append(subprocess.Popen([sys.executable, "-m", *words, "convert", str(path)], env=environment,
                                              stderr=subprocess.PIPE, text=True, cwd=self.folder))  # fmt: skip
        return self._started[-1]

    def finish(self, name: str, kind: str) -> Path:
        """The folder of a conversion that ended well."""
        process = self.start(name, kind)
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        return self.folder / name

    def kill_a_rank(self, name: str, kind: str, command: str) -> tuple[int, str]:
        """Kill one of the processes whose command line holds `command` in the middle of the second stage; how it ended."""
        process, log = self.start(name, kind), self.folder / name / "policy.log.jsonl"
        deadline = time.monotonic() + 200
        while not log.is_file() or len(log.read_text().splitlines()) < 12:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.005)
        everyone = psutil.Process(process.pid).children(recursive=True)
        ranks = [child for child in everyone if command in " ".join(child.cmdline())]
        assert len(ranks) == 2
        ranks[1].kill()
        _, errors = process.communicate(timeout=120)
        assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
        return process.returncode, errors

    def close(self) -> None:
        for process in self._started:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    made = Commands(tmp_path_factory.mktemp("commands"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def under_torchrun(commands: Commands) -> Path:
    """A whole run of two processes, 20 steps and more."""
    folder = commands.finish("torchrun", "torchrun")
    assert len(curve(folder)) >= 20
    return folder


@pytest.mark.slow
def test_torchrun_equals_one_process(under_torchrun: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    run(recipe(tmp_path, *LONGER))
    apart = distance(curve(tmp_path), curve(under_torchrun))
    print(f"{len(curve(tmp_path))} steps, at most {apart:.1e} apart")
    assert apart < 1e-5


@pytest.mark.slow
def test_torchrun_ends_when_a_rank_is_killed_and_goes_on(commands: Commands, under_torchrun: Path) -> None:
    status, _ = commands.kill_a_rank("killed", "torchrun", "blockroll.cli")
    assert status != 0
    folder = commands.finish("killed", "torchrun")
    assert curve(folder) == curve(under_torchrun)
    weights = [(one / "policy" / "model.safetensors").read_bytes() for one in (folder, under_torchrun)]
    assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ray_equals_torchrun_and_goes_on_after_a_lost_worker(commands: Commands, under_torchrun: Path) -> None:
    assert curve(commands.finish("ray", "ray")) == curve(under_torchrun)
    status, errors = commands.kill_a_rank("ray-killed", "ray", "RayTrainWorker")
    assert status == 2
    assert "run the command again to go on from the last checkpoint" in errors.strip().splitlines()[-1]
    assert curve(commands.finish("ray-killed", "ray")) == curve(under_torchrun)


@pytest.mark.slow
def test_ray_reports_what_a_worker_was_refused(commands: Commands) -> None:
    checkpoints = commands.folder / "bad" / "policy.ar.checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "latest").write_text("step-00000004\n")
    refused = commands.start("bad", "ray")
    _, errors = refused.communicate(timeout=280)
    last = errors.strip().splitlines()[-1]
    assert refused.returncode == 2, errors
    assert last.startswith("error: checkpoint: ") and "cannot be resumed" in last
