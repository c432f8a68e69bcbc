"""How one run replaces another in its directory: stopped at any point, the earlier run is whole, or was given up on purpose."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from blockroll.errors import ConfigError
from blockroll.trainer_bridge.trainers.grpo import directory
from blockroll.trainer_bridge.trainers.grpo.directory import recover, replacing, run_files

NAMES = ("config.yaml", "metrics.jsonl", "checkpoint.safetensors", "ledger.sqlite", "ledger.sqlite.weights-3")


class Killed(BaseException):
    """Stands for kill -9: nothing after it in the process runs."""


def make_run(output: Path, text: str) -> None:
    if not output.exists():
        output.mkdir()
    for name in NAMES:
        (output / name).write_text(f"{text} {name}")


def texts(output: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in output.iterdir() if path.is_file()}


def replace(output: Path, fail: bool) -> None:
    with replacing(output, overwrite=True, kept=False) as started:
        make_run(output, "new")
        if fail:
            raise ConfigError("x", "y", "z")
        started()


@pytest.mark.parametrize("fail", [True, False])
def test_a_kill_at_any_operation_loses_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: bool) -> None:
    """Every rename and removal is once the last thing the process does; then the next start is killed at each of its own, too."""
    output, calls, limits = tmp_path / "run", 0, [0]

    def counted(real):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls > limits[0]:
                raise Killed
            return real(*arguments, **options)

        return call

    def killed_after(limit: int, action) -> bool:
        nonlocal calls
        calls, limits[0] = 0, limit
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", counted(Path.rename))
            patch.setattr(Path, "mkdir", counted(Path.mkdir))
            patch.setattr(Path, "rmdir", counted(Path.rmdir))
            patch.setattr(directory, "_remove", counted(directory._remove))
            try:
                action()
            except Killed:
                return True
            except ConfigError:
                pass
        return False

    old = {name: f"old {name}" for name in NAMES}
    outcomes = set()
    for first in range(60):
        finished = False
        for second in range(60):
            shutil.rmtree(output, ignore_errors=True)
            make_run(output, "old")
            with suppress(Killed):
                finished = not killed_after(first, lambda: replace(output, fail))
            again = killed_after(second, lambda: recover(output))
            recover(output)
            kept = texts(output)
            assert kept == old or (not fail and kept == {name: f"new {name}" for name in NAMES}), (first, second, kept)
            assert not [path for path in output.iterdir() if path.is_dir()]
            outcomes.add(kept == old)
            if not again:
                break
        if finished:
            break
    assert finished
    assert outcomes == ({True} if fail else {True, False})


def test_an_earlier_run_is_neither_replaced_nor_kept_unasked(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "old")
    with pytest.raises(ConfigError, match=r"holds a run \(config.yaml\); go on with it \(--resume\), replace it \(--overwrite\)"):
        with replacing(tmp_path / "run", overwrite=False, kept=False):
            pass
    with replacing(tmp_path / "run", overwrite=False, kept=True):
        assert len(run_files(tmp_path / "run")) == len(NAMES)


def test_a_first_start_that_fails_leaves_nothing(tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    with pytest.raises(ValueError), replacing(output, overwrite=False, kept=True):
        make_run(output, "new")
        raise ValueError
    assert not list(output.iterdir())


def test_what_a_kill_left_half_written_is_swept(tmp_path: Path) -> None:
    make_run(tmp_path, "old")
    (tmp_path / ".checkpoint-x8k2.part.safetensors").write_text("half")
    (tmp_path / ".policy-x8k2.part").mkdir()
    recover(tmp_path)
    assert texts(tmp_path) == {name: f"old {name}" for name in NAMES}
