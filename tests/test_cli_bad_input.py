"""What a user can get wrong, through the command line: one line that says what to do, status 2, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread

import psutil
import pytest
from safetensors.torch import load_file, save_file

import blockroll
from blockroll import cli
from blockroll.model.checkpoint import resolve
from blockroll.model.conversion.config import Architecture, ConversionConfig, Stage
from blockroll.model.conversion.train import new_policy

COMMAND = [sys.executable, "-c", "import sys; from blockroll.cli import main; sys.argv[0] = 'blockroll'; main()"]


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """fails(*arguments): runs the command, which must end with status 2 and one line; returns what follows `error: `."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["blockroll", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr().err
        assert (ended.value.code, said.count("\n")) == (2, 1), said
        assert said.startswith("error: ")
        assert "Traceback" not in said
        return said.removeprefix("error: ")

    return run


def drop_tensor(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def not_a_number(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] *= float("nan")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def scramble(directory: Path) -> None:
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(b"\xff" * 64 + data[64:])


def cut(directory: Path) -> None:
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[: len(data) // 2])


def change_config(**changes: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | changes))

    return change


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_text(text) and None


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing tensor": (drop_tensor, "lacks 1 of the policy's tensors, first 'model.norm.weight'; export the whole model again"),
    "not a number": (not_a_number, "model.norm.weight in {} holds NaN or infinity; use a checkpoint from before"),
    "corrupt weights": (scramble, "{}/model.safetensors is corrupt"),
    "truncated weights": (cut, "{}/model.safetensors is corrupt"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "{}/model.safetensors is missing; copy every file"),
    "corrupt index": (write("model.safetensors.index.json", "{}"), "{}/model.safetensors.index.json is corrupt"),
    "config is no JSON": (write("config.json", "{"), "{}/config.json is not JSON"),
    "config is a list": (write("config.json", "[]"), "{}/config.json describes a None model; use a ZAYA checkpoint"),
    "config of another type": (change_config(hidden_size="big"), "hidden_size in {}/config.json is 'big', no whole number"),
    "config of another size": (change_config(hidden_size=64), "use the config.json that was saved with the weights"),
    "another architecture": (change_config(model_type="llama"), "describes a 'llama' model; use a ZAYA checkpoint"),
    "block size of another type": (change_config(diffusion={"block_size": "x"}), "block_size and mask_token_id as whole"),
    "corrupt tokenizer": (write("tokenizer.json", "{"), "{}/tokenizer.json is not JSON"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_checkpoint(what: str, fails: Callable[..., str], tmp_path: Path) -> None:
    directory, prompts = tmp_path / "policy", tmp_path / "prompts.jsonl"
    shutil.copytree(resolve("tiny-reasoner"), directory)
    prompts.write_text('{"id": "a", "prompt_tokens": [1, 20, 30]}\n')
    break_it, said = BROKEN[what]
    break_it(directory)
    output = tmp_path / "out.jsonl"
    error = fails("generate", "--policy", directory, "--input", prompts, "--output", output)
    assert error.startswith("policy: ") and said.format(directory) in error
    config = tmp_path / "run.yaml"
    config.write_text(f"output: {tmp_path / 'run'}\npolicy: {directory}\n")
    assert fails("grpo", config) == error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["policy", "prompts.jsonl", "run.yaml"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("outptu: x", "outptu: unknown key in {}; did you mean `output`?"),
        ("output: x\nrollouts: {stalenes: 1}", "rollouts.stalenes: unknown key in {}; did you mean `staleness`?"),
        ("output: x\nsteps: many", 'steps: "many" in {} cannot be used; it should be a valid integer'),
        ("output: x\nsteps: 1.5", "steps: 1.5 in {} cannot be used"),
        ("output: x\nrollouts: {sampler: best}", "rollouts.sampler: \"best\" in {} cannot be used; it should be 'ar', "),
        ("output: x\nrollouts: {in_flight: later}", 'rollouts.in_flight: "later" in {} cannot be used; it should be'),
        ("output: x\nservice: {schedule: {levels: [99]}}", "service.schedule.levels: (99,) holds a level outside 0..63 in the "),
        ("output: x\nservice: {engine: {}}", "service.engine: unknown key in the section service; did you mean `engines`?"),
        ("output: x\nservice: {policy: y}", "service.policy: is given; leave it out: the run says it"),
        ("output: x\ntasks: {families: [sums]}", "tasks.families: unknown ['sums'] in {}; use some of "),
        ("output: x\npolicy: nobody", "policy: 'nobody' is no directory with a config.json; give one, or a shipped name"),
        ("output: [", "{} line 2: "),
        ("- a", "{}: holds a list, not keys and values"),
        ("output: /proc/no/run", "/proc/no/run: cannot be written"),
    ],
)
def test_bad_run(text: str, said: str, fails: Callable[..., str], tmp_path: Path,
                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "run.yaml"
    config.write_text(text + "\n")
    assert fails("grpo", config).startswith(said.format(config))
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]


def test_prompt_longer_than_the_maximum(fails: Callable[..., str], tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(json.dumps({"id": "a", "prompt_tokens": [1] * 2000}) + "\n")
    error = fails("generate", "--policy", "tiny-reasoner", "--input", prompts, "--output", output)
    assert error.startswith(f"{prompts} line 1: prompt_tokens: 2000 tokens, and this policy's maximum is ")
    assert "shorten it to" in error
    assert not output.exists()


def test_ray_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"output: {tmp_path / 'run'}\nservice: {{ray: {{address: '127.0.0.1:9'}}}}\n")
    monkeypatch.setattr(sys, "argv", ["blockroll", "grpo", str(config)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.splitlines()[-1].startswith("error: ray: the one at 127.0.0.1:9 cannot be reached")
    assert "Traceback" not in said


RUN = """
output: {output}
policy: {policy}
steps: 40
tasks: {{prompts_per_step: 8, samples_per_prompt: 4}}
rollouts: {{max_tokens: 48}}
service: {{engines: {{count: 1}}}}
evaluation: {{tasks: 4}}
"""


@pytest.fixture(scope="module")
def small_policy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """small_policy(longest): a random one of at most so many positions."""

    def make(longest: int) -> Path:
        shape = Architecture(hidden_size=32, layers=2, heads=4, head_dim=8, experts=2, expert_size=32, router_size=8,
                             max_position_embeddings=longest)
        config = ConversionConfig(output="unused", architecture=shape, stages=(Stage(name="none", kind="ar", tokens=1),))
        policy = new_policy(config)
        policy.converted = True
        return blockroll.save_policy(policy, tmp_path_factory.mktemp("policies") / "small")

    return make


def run_grpo(config: Path) -> subprocess.CompletedProcess[str]:
    """`blockroll grpo CONFIG`, with a mark in the environment by which its processes are known."""
    mark = f"BLOCKROLL_TEST_RUN={config}"
    name, value = mark.split("=")
    done = subprocess.run([*COMMAND, "grpo", str(config)], capture_output=True, text=True, timeout=240,
                          env=os.environ | {name: value})
    end = time.monotonic() + 10.0
    while left := [p for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get(name) == value]:
        assert time.monotonic() < end, f"processes left behind: {left}"
        time.sleep(0.2)
    return done


def one_error(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and "Traceback" not in done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and done.stderr.splitlines()[-1] == errors[0], done.stderr
    return errors[0]


@pytest.fixture
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A disk of so many KiB as the test says."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a tmpfs")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("disk", [300], indirect=True)
def test_disk_that_is_full_before_a_run(disk: Path, tmp_path: Path) -> None:
    (disk / "other").write_bytes(b"x" * (300 << 10))
    config = tmp_path / "run.yaml"
    config.write_text(RUN.format(output=disk / "run", policy="tiny-reasoner"))
    error = one_error(run_grpo(config))
    assert error == f"error: {disk}/run/config.yaml: the disk is full; free some space or write to another disk, then run again"
    assert not list((disk / "run").iterdir())


@pytest.mark.parametrize("disk", [20_000], indirect=True)
@pytest.mark.slow
def test_disk_that_fills_up_during_a_run(disk: Path, tmp_path: Path, small_policy: Callable[[int], Path]) -> None:
    config, metrics = tmp_path / "run.yaml", disk / "run" / "metrics.jsonl"
    config.write_text(RUN.format(output=disk / "run", policy=small_policy(256)))

    def fill() -> None:
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            time.sleep(0.01)
        with open(disk / "other", "wb", buffering=0) as other, suppress(OSError):
            while True:
                other.write(b"x" * 4096)

    Thread(target=fill, daemon=True).start()
    done = run_grpo(config)
    error = one_error(done)
    assert str(disk / "run") in error and "full" in error and "free" in error
    assert "step 1/" in done.stderr
    assert 2 <= len(metrics.read_text().splitlines()) < 40
    assert not {"summary.json", "report.png", "policy"} & {p.name for p in (disk / "run").iterdir()}


@pytest.mark.slow
def test_run_whose_prompts_are_longer_than_the_maximum(tmp_path: Path, small_policy: Callable[[int], Path]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(RUN.format(output=tmp_path / "run", policy=small_policy(16)))
    error = one_error(run_grpo(config))
    assert "prompt_tokens" in error and "the policy's maximum is 16; shorten the prompt to at most 15 tokens" in error
    assert not (tmp_path / "run" / "summary.json").exists()
