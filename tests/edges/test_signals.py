"""Signals end every command alike: one line, 128 + the signal's number, nothing half-written, no process left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from harness import SIGINT, SIGTERM, Case, ForkServer

PROMPTS = "".join(json.dumps({"id": i, "prompt_tokens": [1, 20, 30]}) + "\n" for i in range(2000))
GENERATE = ("generate", "--policy", "tiny-reasoner", "--input", "in.jsonl", "--output", "out.jsonl", "--n", "8")
RECIPE = """
output: out
parent: tiny-reasoner-ar
stages: [{name: s, kind: diffusion, tokens: 100000000, pack_tokens: 512, report_steps: 1}]
"""
COMMAND = [sys.executable, "-c", "import sys; from blockroll.cli import main; sys.argv[0] = 'blockroll'; main()"]
RUN = """
output: run
policy: tiny-reasoner
steps: 1000
tasks: {prompts_per_step: 2, samples_per_prompt: 2}
rollouts: {max_tokens: 16}
evaluation: {tasks: 1}
"""


@pytest.mark.parametrize("number", [SIGTERM, SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_generate_leaves_nothing(number: signal.Signals, edges: ForkServer, tmp_path: Path) -> None:
    case = Case("generate", GENERATE, {"in.jsonl": PROMPTS}, signal=number, when=".out-*", status=128 + number, seconds=60.0,
                says=(f"stopped by {number.name}",))  # fmt: skip
    edges.check(case, tmp_path)


def test_convert_leaves_what_it_goes_on_from(edges: ForkServer, tmp_path: Path) -> None:
    case = Case("convert", ("convert", "run.yaml"), {"run.yaml": RECIPE}, signal=SIGTERM, when="out.log.jsonl", status=143,
                seconds=60.0, says=("stopped by SIGTERM",), makes=("out.log.jsonl",))  # fmt: skip
    edges.check(case, tmp_path)


def test_a_second_signal_does_not_disturb_the_end(edges: ForkServer, tmp_path: Path) -> None:
    program = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGTERM)
finally:
    os.kill(os.getpid(), signal.SIGTERM)
    open("ended", "w")
"""
    edges.check(Case("twice", program=program, status=143, says=("stopped by SIGTERM",), makes=("ended",)), tmp_path)


def marked(mark: str) -> list[psutil.Process]:
    """Processes with a variable of this value in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("BLOCKROLL_TEST_RUN") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_no_process_of_ray_is_left(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    environment = os.environ | {"BLOCKROLL_TEST_RUN": str(tmp_path)}
    command = [*COMMAND, "grpo", "run.yaml"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as run:
        end = time.monotonic() + 120
        while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < end and run.poll() is None:
            time.sleep(0.1)
        assert len(marked(str(tmp_path))) > 3
        run.send_signal(number)
        _, said = run.communicate(timeout=60)
    end = time.monotonic() + 20
    while (left := marked(str(tmp_path))) and time.monotonic() < end:
        time.sleep(0.1)
    names = [" ".join(process.cmdline())[:100] for process in left]
    for process in left:
        process.kill()
    assert not names
    if number == SIGTERM:
        assert run.returncode == 143, said
        assert said.splitlines()[-1] == "stopped by SIGTERM" and "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("number", [SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_no_worker_of_an_ablation_is_left(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "output: out\nparent: tiny-reasoner-ar\nstage: {name: s, kind: diffusion, tokens: 100000000, pack_tokens: 512}\n"
        "variants: {a: {}, b: {alpha: 2.0}}\nseeds: [0]\n"
    )
    environment = os.environ | {"BLOCKROLL_TEST_RUN": str(tmp_path)}
    command = [*COMMAND, "ablate", "run.yaml", "--workers", "2"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as run:
        end = time.monotonic() + 120
        while len(list((tmp_path / "out").glob("*/*.log.jsonl"))) < 2 and time.monotonic() < end and run.poll() is None:
            time.sleep(0.1)
        run.send_signal(number)
        _, said = run.communicate(timeout=60)
    end = time.monotonic() + 20
    while (left := marked(str(tmp_path))) and time.monotonic() < end:
        time.sleep(0.1)
    for process in left:
        process.kill()
    assert not left
    assert run.returncode == (143 if number == SIGTERM else -9), said
