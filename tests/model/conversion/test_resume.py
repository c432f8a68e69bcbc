"""A run that was killed goes on as if it had not been."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conversion_parts import SHAPE, curve, recipe

from blockroll.errors import CheckpointError, ConfigError
from blockroll.model.conversion.config import ConversionConfig
from blockroll.model.conversion.train import run, stage_directory

STAGES = (
    dict(name="ar", kind="ar", tokens=6000, checkpoint_steps=4),
    dict(name="diffusion", kind="diffusion", tokens=6000, checkpoint_steps=4, draft=dict(ce=0.5, tv=1.0), packs_per_step=2),
)


class Killed(Exception):
    """Raised where a process would have died."""


def run_until(config: ConversionConfig, stage: str, step: int) -> None:
    def die(row: dict) -> None:
        if (row["stage"], row["step"]) == (stage, step):
            raise Killed

    with pytest.raises(Killed):
        run(config, die)


def weights(folder: Path) -> bytes:
    return (folder / "policy" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run(recipe(folder, *STAGES))
    return folder


def test_killed_anywhere_gives_the_same_curve_and_weights(uninterrupted: Path, tmp_path: Path) -> None:
    config = recipe(tmp_path, *STAGES)
    run_until(config, "ar", 3)  # before the first checkpoint
    run_until(config, "ar", 6)
    run_until(config, "diffusion", 5)
    assert (tmp_path / "policy.diffusion.checkpoints" / "latest").read_text() == "step-00000004\n"
    assert curve(tmp_path)[-1]["step"] == 5
    policy = run(config)
    assert curve(tmp_path) == curve(uninterrupted)
    assert weights(tmp_path) == weights(uninterrupted)
    assert policy is not None and policy.converted
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"policy", "policy.ar", "policy.diffusion", "policy.log.jsonl"}


def test_checkpoint_that_was_not_finished_is_not_used(uninterrupted: Path, tmp_path: Path) -> None:
    config = recipe(tmp_path, *STAGES)
    run_until(config, "ar", 6)
    half = tmp_path / "policy.ar.checkpoints" / "step-00000008"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half of it")
    run(config)
    assert curve(tmp_path) == curve(uninterrupted)


def test_broken_checkpoint_and_changed_recipe_are_refused(tmp_path: Path) -> None:
    config = recipe(tmp_path, *STAGES)
    run_until(config, "ar", 6)
    other = recipe(tmp_path, dict(STAGES[0], learning_rate=1e-3), STAGES[1])
    with pytest.raises(ConfigError, match=r"stages\.ar\.learning_rate: 0\.001 is not what .* trained with \(0\.002\)"):
        run(other)
    assert curve(tmp_path)[-1]["step"] == 6
    (tmp_path / "policy.ar.checkpoints" / "step-00000004" / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        run(config)
    assert curve(tmp_path)[-1]["step"] == 6


def test_finished_stages_are_not_taken_for_those_of_another_recipe(uninterrupted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(uninterrupted, tmp_path / "copy")
    ar, diffusion = STAGES
    for changed, changes in {
        "stages.ar.learning_rate: 0.001 is not": dict(stages=[dict(ar, learning_rate=1e-3), diffusion]),
        "stages.ar.start.layers: 3 is not": dict(architecture=dict(SHAPE, layers=3)),
        "stages.ar.data.pool: 9 is not": dict(data=dict(pool=9)),
        "stages.diffusion.draft.tv: 0.5 is not": dict(stages=[ar, dict(diffusion, draft=dict(ce=0.5, tv=0.5))]),
        "stages.diffusion.start: 'more' is not": dict(stages=[ar, dict(ar, name="more", tokens=600), diffusion]),
    }.items():
        stages = changes.pop("stages", STAGES)
        with pytest.raises(ConfigError, match=re.escape(changed)):
            run(recipe(folder, *stages, **changes))
        assert weights(folder) == weights(uninterrupted)
    run(recipe(folder, dict(ar, checkpoint_steps=5), diffusion))
    assert weights(folder) == weights(uninterrupted)


def test_stages_are_skipped_and_repeated(tmp_path: Path) -> None:
    short = dict(tokens=1200)
    config = recipe(tmp_path, dict(STAGES[0], **short, repeat=2), dict(STAGES[1], name="left_out", skip=True, **short),
                    dict(STAGES[1], **short))  # fmt: skip
    run(config)
    rows = curve(tmp_path)
    assert list(dict.fromkeys(row["stage"] for row in rows)) == ["ar", "ar-2", "diffusion"]
    first, second = ([row["ar_loss"] for row in rows if row["stage"] == name] for name in ("ar", "ar-2"))
    assert first != second
    assert not stage_directory(config, "left_out").exists()
    with pytest.raises(ValueError, match="two stages are named 'ar-2'"):
        recipe(tmp_path, dict(STAGES[0], repeat=2), dict(STAGES[0], name="ar-2"))


@pytest.mark.slow
def test_killed_process_goes_on_bit_for_bit(uninterrupted: Path, tmp_path: Path) -> None:
    """kill -9, no exception to clean up after."""
    path = tmp_path / "recipe.json"
    path.write_text(recipe(tmp_path, *STAGES).model_dump_json())
    program = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from blockroll.model.conversion.config import ConversionConfig\n"
        "from blockroll.model.conversion.train import run\n"
        "run(ConversionConfig.model_validate_json(open(sys.argv[1]).read()))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(path)])
    log, deadline = tmp_path / "policy.log.jsonl", time.monotonic() + 120
    while not (log.is_file() and any(json.loads(line)["step"] == 6 for line in log.read_text().splitlines())):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "policy").exists()
    torch.set_num_threads(1)
    run(recipe(tmp_path, *STAGES))
    assert curve(tmp_path) == curve(uninterrupted)
    assert weights(tmp_path) == weights(uninterrupted)
