"""The whole of a service: configs/cluster/local.yaml, a trainer and a client in other processes, scale, down, up, kill."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from service_parts import RUN, Commands

LOCAL = Path(__file__).resolve().parents[2] / "configs" / "cluster" / "local.yaml"
CLIENT = """
import sys
import blockroll

params = blockroll.SamplingParams(sampler="coupled", max_tokens=64)
tokens = tuple(range(5, 25))
with blockroll.connect(sys.argv[1], client_id="ten-lines") as client:
    client.submit(blockroll.RolloutRequest(f"q{i}", tokens[: 3 + i % 9], params, seed=i, samples=4) for i in range(60))
    print(sum(1 for _ in client.results(timeout=120)))
"""


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    found = Commands(tmp_path)
    yield found
    found.end()


@pytest.mark.slow
def test_local_yaml_with_a_trainer_and_a_client(commands: Commands) -> None:
    began = time.monotonic()
    commands.run("up", LOCAL, "--detach")
    print(f"up after {time.monotonic() - began:.1f} s")
    try:
        found = commands.status(LOCAL)
        assert [engine["state"] for engine in found["engines"]] == ["idle", "idle"]
        (commands.directory / "run.yaml").write_text(RUN)
        trainer = commands.start("grpo", "run.yaml", "--address", found["address"])
        client = commands.start(found["address"], program=CLIENT)
        commands.run("scale", LOCAL, 3)
        deadline = time.monotonic() + 120
        while sum(engine["state"] in ("idle", "busy") for engine in commands.status(LOCAL)["engines"]) < 3:
            assert time.monotonic() < deadline, commands.status(LOCAL)
            time.sleep(0.3)
        commands.run("scale", LOCAL, 1)
        out, err = client.communicate(timeout=300)
        assert (client.returncode, out) == (0, "240\n"), err
        out, err = trainer.communicate(timeout=600)
        assert trainer.returncode == 0, err
        while len(commands.status(LOCAL)["engines"]) > 1:
            assert time.monotonic() < deadline + 300
            time.sleep(0.3)
        before = commands.status(LOCAL)
    finally:
        commands.run("down", LOCAL)
    commands.wait_until_none_is_left()
    summary = json.loads((commands.directory / "run" / "summary.json").read_text())
    asked = 4 * 6 * 4 + 2 * 2 * 6
    assert summary["trajectories"] == {"requested": asked, "unique": asked, "duplicates": 0, "missing": 0}
    assert before["requested"] == before["unique"] == asked + 240 and before["version"] == 5 == summary["final_weight_version"]

    commands.run("up", LOCAL, "--detach")
    after = commands.status(LOCAL)
    same = ("version", "requested", "unique")
    assert [after[name] for name in same] == [before[name] for name in same]
    assert {engine["version"] for engine in after["engines"]} == {5}

    # A service that is killed is noticed, and its engines and Ray end by themselves.
    pid = int(commands.run("status", LOCAL).split("process ")[1].split(",")[0])
    os.kill(pid, signal.SIGKILL)
    assert "no service of runs/local/ledger.sqlite runs" in commands.run("status", LOCAL, status=2)
    commands.wait_until_none_is_left(60.0)
    commands.run("up", LOCAL, "--detach")
    again = commands.status(LOCAL)
    assert [again[name] for name in same] == [before[name] for name in same]
    commands.run("down", LOCAL, "--now")
    commands.wait_until_none_is_left()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_service_with_one_line(number: signal.Signals, commands: Commands) -> None:
    service = commands.start("up", LOCAL)
    assert service.stdout is not None and service.stdout.readline().startswith("the service of tiny-reasoner is up at ")
    client = commands.start(commands.status(LOCAL)["address"], program=CLIENT.replace("samples=4", "samples=100"))
    while not commands.status(LOCAL)["unique"]:  # the client's imports take a while
        time.sleep(0.1)
    service.send_signal(number)
    out, err = service.communicate(timeout=60)
    lines = [line for line in err.splitlines() if " INFO " not in line and " WARNING " not in line]
    assert (service.returncode, out) == (128 + number, "") and len(lines) == 1, err
    said = rf"the service is down \({number.name}\); runs/local/ledger.sqlite keeps [1-9]\d* unfinished samples and \d+ that .*"
    assert re.fullmatch(said, lines[0])
    client.kill()
    client.wait()
    commands.wait_until_none_is_left()
    commands.run("up", LOCAL, "--detach")
    deadline = time.monotonic() + 120
    while (found := commands.status(LOCAL))["requested"] != found["unique"]:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    commands.run("down", LOCAL)
    commands.wait_until_none_is_left()


@pytest.mark.slow
def test_a_start_that_fails_says_why_in_one_line_and_leaves_nothing(commands: Commands) -> None:
    path, taken = commands.directory / "bad.yaml", socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    busy = f"policy: tiny-reasoner\nengines: {{count: 1}}\ndelivery: {{bind: 'tcp://127.0.0.1:{taken.getsockname()[1]}'}}\n"
    for text, said in (
        ("policy: nobody", "error: policy: 'nobody' is no directory"),
        ("policy: tiny-reasoner\nengines: {count: 1, device: cuda, num_gpus: 1}", "error: engines.device: cuda with num"),
        ("policy: tiny-reasoner\nengines: {count: 1, pages: 100000000}", "error: engines.pages: 1 engines need "),
        (busy, "error: delivery.bind: tcp://127.0.0.1:"),
        ("policy: tiny-reasoner\nengines: {count: 1, resources: {MI300X: 1}}", "error: cluster: "),
        ("policy: tiny-reasoner\nengines: {count: 1}\nray: {address: '127.0.0.1:9'}", "error: ray: the one at 127.0.0.1:9 "),
    ):
        path.write_text(text)
        assert commands.run("up", path, "--detach", status=2).startswith(said)
        commands.wait_until_none_is_left()
    taken.close()
