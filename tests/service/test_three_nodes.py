"""A service over three Ray nodes, one of which is removed while a trainer and a client are served."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

sys.path.insert(0, str(Path(__file__).parent))

from service_parts import RUN, Commands

CONFIG = """
policy: tiny-reasoner
engines: {{count: 3, num_cpus: 1, oversubscribe: true, placement: spread}}
ray: {{address: '{address}'}}
delivery: {{ledger: ledger.sqlite, bind: 'tcp://127.0.0.1:*'}}
"""
ASKED, WAIT_S = 4 * 6 * 4 + 2 * 2 * 6, 240.0
"""Samples of the run, its evaluations included; and seconds after which what has to come has not."""
CLIENT = """
import sys
import blockroll

params = blockroll.SamplingParams(sampler="coupled", max_tokens=160, ignore_eos=True)
with blockroll.connect(sys.argv[1], client_id="ten-lines") as client:
    client.submit(blockroll.RolloutRequest(f"q{i}", (5, 6 + i % 9), params, seed=i, samples=4) for i in range(60))
    found = {}
    for sample in client.results(timeout=300):
        assert sample.key not in found
        found[sample.key] = sample.tokens
        if len(found) == 24:
            print("busy", flush=True)
print(len(found), flush=True)
"""


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    found = Commands(tmp_path)
    yield found
    found.end()


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("RAY_worker_niceness", "0")  # as a Ray that the service starts itself
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 << 20,
                                                            "include_dashboard": False})  # fmt: skip
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
        yield cluster
    finally:
        cluster.shutdown()


def until(what: Callable[[], Any]) -> Any:
    end = time.monotonic() + WAIT_S
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.3)
    return found


def raylet_of(engine: dict[str, Any]) -> int:
    """Process id of the Ray node that an engine's process belongs to."""
    parent = psutil.Process(engine["pid"]).parent()
    assert parent is not None and parent.name() == "raylet"
    return parent.pid


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_of_three_nodes_is_removed_in_mid_run(commands: Commands, nodes: Cluster) -> None:
    config = commands.directory / "service.yaml"
    config.write_text(CONFIG.format(address=nodes.address))

    def engines(*states: str) -> list[dict[str, Any]]:
        return [engine for engine in commands.status(config)["engines"] if engine["state"] in states]

    def three_idle() -> list[dict[str, Any]]:
        found = engines("idle")
        return found if len(found) == 3 else []

    commands.run("up", config, "--detach")
    try:
        raylets = {raylet_of(engine) for engine in until(three_idle)}
        assert len(raylets) == 3
        address = commands.status(config)["address"]
        (commands.directory / "run.yaml").write_text(RUN)
        trainer = commands.start("grpo", "run.yaml", "--address", address)
        until(lambda: commands.status(config)["version"] >= 2)
        client = commands.start(address, program=CLIENT)
        assert client.stdout is not None and client.stdout.readline() == "busy\n"
        gone = next(node for node in nodes.worker_nodes)
        pid = gone.all_processes["raylet"][0].process.pid
        assert pid in raylets
        nodes.remove_node(gone, allow_graceful=False)

        [waits] = until(lambda: engines("waiting"))
        assert waits["pid"] is None and "CPU are free and it needs 1" in commands.run("status", config)
        out, err = client.communicate(timeout=WAIT_S)
        assert (client.returncode, out) == (0, "240\n"), err
        out, err = trainer.communicate(timeout=WAIT_S)
        assert trainer.returncode == 0, err
        summary = json.loads((commands.directory / "run" / "summary.json").read_text())
        assert summary["trajectories"] == {"requested": ASKED, "unique": ASKED, "duplicates": 0, "missing": 0}
        assert {engine["version"] for engine in engines("idle", "busy")} == {5}

        # Another node takes its place; the engine there begins with the version that serves.
        nodes.add_node(num_cpus=1, object_store_memory=100 << 20)
        back = until(three_idle)
        assert {engine["version"] for engine in back} == {5} and len({raylet_of(engine) for engine in back}) == 3
        commands.run("scale", config, 1)
        until(lambda: len(commands.status(config)["engines"]) == 1)
        before = commands.status(config)
    finally:
        commands.run("down", config)
    commands.wait_until_none_is_left()
    assert before["requested"] == before["unique"] == ASKED + 240 and before["version"] == 5 and before["restarts"] == 1

    commands.run("up", config, "--detach")
    after = commands.status(config)
    commands.run("down", config)
    same = ("version", "requested", "unique")
    assert [after[name] for name in same] == [before[name] for name in same]
    assert {engine["version"] for engine in after["engines"]} == {5}
