"""Outputs: regular files at their real path, whole or as they were, with nothing of a killed writer left beside them."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import pytest
from harness import Case, ForkServer, fifo, folder, link_to

PROMPTS = '{"id": "a", "prompt_tokens": [1, 20, 30]}\n'
NOBODY = 65_534


def reachable(*paths: str) -> bool:
    """Whether another user may enter these folders: a command imports modules from them while it runs."""
    folders = [Path(path).resolve() for path in paths]
    return all(above.stat().st_mode & 0o001 for folder in folders for above in (folder, *folder.parents))


def generate(name: str, output: str, *says: str, **more) -> Case:
    argv = ("generate", "--policy", "tiny-reasoner", "--input", "in.jsonl", "--output", output, "--max-tokens", "4")
    files = {"in.jsonl": PROMPTS, **more.pop("files", {})}
    return Case(f"generate {name}", argv, files, says=says, **more)


def device(path: Path) -> None:
    """Makes a device: a node of the case's own for root, because code at fault would replace that of the machine."""
    if os.geteuid():
        path.symlink_to("/dev/null")
    else:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))


def of_mode(mode: int):
    def make(path: Path) -> None:
        path.mkdir()
        path.chmod(mode)

    return make


EVAL = ("eval", "tiny-reasoner", "--tasks", "4", "--samples", "1")
CASES = [
    generate("to the input", "in.jsonl", "in.jsonl", "two files", "name of its own"),
    generate("to the input by another name", "./in.jsonl", "in.jsonl", "two files"),
    generate("to a link to the input", "out", "out", "two files", files={"out": link_to("in.jsonl")}),
    generate("to another name of the input's inode", "out", "out", "two files",
             files={"out": lambda path: os.link(path.parent / "in.jsonl", path)}),
    generate("to a directory", "out", "out", "it is a directory", files={"out": folder}),
    generate("to nothing", "", "directory"),
    generate("to a link to a directory", "out", "out", "it is a directory", files={"dir": folder, "out": link_to("dir")}),
    generate("to a link to itself", "out", "out", "symbolic links", files={"out": link_to("out")}),
    generate("to a device", "null", "null", "device", files={"null": device}),
    generate("to a link to a device", "out", "out", "device", files={"null": device, "out": link_to("null")}),
    generate("to a pipe that nobody reads", "out", "out", "pipe that nobody reads", files={"out": fifo}),
    generate("under a file", "in.jsonl/out", "in.jsonl/out", "not a directory"),
    generate("to a name of 5,000 characters", "x" * 5000, "xxx", "too long"),
    generate("where nothing can be made", "/proc/out", "/proc/out", "cannot be written"),
    Case("score to the input", ("score", "--policy", "tiny-reasoner", "--input", "in.jsonl", "--output", "in.jsonl"),
         {"in.jsonl": PROMPTS}, says=("in.jsonl", "two files")),
    Case("eval: figures to a directory", (*EVAL, "--json", "out"), {"out": folder}, says=("out", "it is a directory")),
    Case("eval: figures called .png", (*EVAL, "--json", "out.png"), says=("out.png", "two files")),
    Case("eval: figures and card in one", (*EVAL, "--json", "a", "--card", "a"), says=("a:", "two files")),
    Case("eval: card to a device", (*EVAL, "--card", "null"), {"null": device}, says=("null", "device")),
    Case("plan: to what was measured", ("plan", "--measured", "m.json", "--json", "m.json"), {"m.json": "{}"},
         says=("m.json", "two files")),
    Case("plan: to a device", ("plan", "--json", "null"), {"null": device}, says=("null", "device")),
    Case("bench decode: to a directory", ("bench", "decode", "--policy", "tiny-reasoner", "--json", "out"), {"out": folder},
         says=("out", "it is a directory")),
    Case("bench planner: to a device", ("bench", "planner", "--policy", "tiny-reasoner", "--json", "null"),
         {"null": device}, says=("null", "device")),
    Case("bench gpu: to a device", ("bench", "gpu", "--json", "null"), {"null": device}, says=("null", "device")),
    Case("kernels check: to a device", ("kernels", "check", "--json", "null"), {"null": device}, says=("null", "device")),
    *([] if os.geteuid() or not reachable(sys.prefix, str(Path(__file__).parent)) else [
        generate("to a directory without permission", "dir/out", "dir/out", "permission to write", files={"dir": of_mode(0o555)},
                 user=NOBODY),
        Case("an unreadable input", ("score", "--policy", "tiny-reasoner", "--input", "dir/in", "--output", "out"),
             {"dir": of_mode(0)}, user=NOBODY, says=("dir/in", "cannot be read", "Permission denied")),
        Case("an unreadable config", ("grpo", "dir/run.yaml"), {"dir": of_mode(0)}, user=NOBODY,
             says=("dir/run.yaml", "cannot be read", "Permission denied")),
    ]),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs(case: Case, edges: ForkServer, tmp_path: Path) -> None:
    if case.user:
        for above in (tmp_path, *tmp_path.parents[:3]):
            above.chmod(above.stat().st_mode | 0o011)
    edges.check(case, tmp_path)


def test_a_link_stays_and_what_it_points_to_is_written(edges: ForkServer, tmp_path: Path) -> None:
    files = {"real": "old", "out.jsonl": link_to("real")}
    outcome = edges.run(generate("link", "out.jsonl", files=files), tmp_path)
    assert (outcome.status, outcome.appeared, outcome.changed) == (0, (), ("real",)), outcome
    assert json.loads((tmp_path / "case" / "real").read_text())["id"] == "a"


def test_a_pipe_that_is_read_gets_the_lines(edges: ForkServer, tmp_path: Path) -> None:
    program = """
import os, sys, threading
from blockroll import SamplingParams
from blockroll.rollout.offline import generate_file
read, write = os.pipe()
generate_file("tiny-reasoner", "in.jsonl", f"/dev/fd/{write}", params=SamplingParams(max_tokens=4))
os.close(write)
assert b'"id": "a"' in os.read(read, 65536)
"""
    edges.check(Case("pipe", files={"in.jsonl": PROMPTS}, program=program, status=0, seconds=60.0), tmp_path)


def test_what_a_killed_writer_left_is_swept_and_what_a_living_one_writes_is_not(edges: ForkServer, tmp_path: Path) -> None:
    program = """
import os, signal, subprocess, sys, time
from pathlib import Path
from blockroll.files import whole_directory, whole_file
def child(body):
    pid = os.fork()
    if pid == 0:
        body()
        os._exit(0)
    return pid
def writes():
    with whole_file("out.json") as part:
        part.write_text("half")
        Path("begun").touch()
        time.sleep(60)
def makes():
    with whole_directory("out") as part:
        (part / "half").touch()
        Path("made").touch()
        time.sleep(60)
def parts():
    return len(list(Path(".").glob(".out-*.part*")))
for body, mark in ((writes, "begun"), (makes, "made")):
    pid = child(body)
    while not Path(mark).exists():
        time.sleep(0.01)
    before = parts()
    with whole_file("out.json") as part:
        part.write_text("whole")
    with whole_directory("out") as part:
        (part / "whole").touch()
    assert parts() == before == 1, parts()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with whole_file("out.json") as part:
        assert parts() == 1 + (body is makes)
    with whole_directory("out") as part:
        assert parts() == 1
    assert parts() == 0
"""
    edges.check(Case("sweep", program=program, status=0, makes=("begun", "made", "out.json", "out", "out/whole")), tmp_path)


LOCKED = {
    "grpo": ("from blockroll.files import locked_directory", "locked_directory('run')", "output: run\n", "run"),
    "convert": ("from blockroll.files import locked_name", "locked_name('run')",
                "output: run\nparent: tiny-reasoner-ar\nstages: [{name: s, kind: diffusion, tokens: 100}]\n", "run"),
    "ablate": ("from blockroll.files import locked_directory", "locked_directory('run')",
               "output: run\nparent: tiny-reasoner-ar\nstage: {name: s, kind: ar, tokens: 100}\nvariants: {a: {}}\n", "run"),
}  # fmt: skip


@pytest.mark.parametrize("command", LOCKED)
def test_a_second_run_in_a_directory_that_is_in_use(command: str, edges: ForkServer, tmp_path: Path) -> None:
    imported, lock, config, output = LOCKED[command]
    program = f"""
import os, sys
{imported}
import blockroll.rollout.conversion.convert, blockroll.rollout.conversion.ablation
with {lock}:
    pid = os.fork()
    if pid == 0:
        if "{command}" == "grpo":
            from blockroll.service.lifecycle import serve
            from blockroll.trainer_bridge.trainers.grpo import run
            run.run("run.yaml", serve)
        elif "{command}" == "convert":
            blockroll.rollout.conversion.convert.convert("run.yaml")
        else:
            blockroll.rollout.conversion.ablation.ablate("run.yaml")
    else:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    files = {"run.yaml": config, "run/keep": "1"}
    says = (output, "another process is writing here")
    edges.check(Case(command, files=files, program=program, says=says, makes=(".run.lock",)), tmp_path)
    assert os.listdir(tmp_path / "case" / "run") == ["keep"]
