"""Every file in examples/ runs, and says what it promises. Those that train against a service make two steps here, and so does a
run on prompts and rewards of one's own."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import ray

from blockroll.errors import DataError
from blockroll.service.config import ServiceConfig
from blockroll.service.lifecycle import serve
from blockroll.service.of_run import service_of
from blockroll.settings import parse
from blockroll.trainer_bridge.trainers.grpo.metrics import read_rows
from blockroll.trainer_bridge.trainers.grpo.run import run

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SAYS = {
    "generate.py": ["Q:47+85-12", "120", "tokens per forward"],
    "constrained.py": ["'\\nA:", "stop"],
    "search.py": ["120", "samples", "tokens"],
    "policy_gradient.py": ["differ by at most", "version 1"],
}
TWO_STEPS = {
    "plain_loop.py": {"steps": 2},
    "ppo.py": {"steps": 2, "prompts": 24},
    "multi_turn_tools.py": {"steps": 2, "prompts": 4, "samples": 4},
}
"""Options of those that are given the address of a service."""
ELSEWHERE = {"trl_grpo.py", "trl_async.py"}
"""Those that run in tests/trainer_bridge/adapters/test_trl.py."""


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*SAYS, *TWO_STEPS, *ELSEWHERE}


@pytest.mark.parametrize("name", SAYS)
def test_an_example(name, capsys):
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    printed = capsys.readouterr().out
    for text in SAYS[name]:
        assert text in printed


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    ledger = str(tmp_path_factory.mktemp("service") / "ledger.sqlite")
    engines = {"count": 1, "device": "cpu", "num_cpus": 0.5, "batch": 32}
    values = {"policy": "tiny-reasoner-terse", "engines": engines, "schedule": {"kind": "fused"}, "delivery": {"ledger": ledger}}
    with serve(parse(values, ServiceConfig, "test")) as service:
        yield service.address
    assert not ray.is_initialized()  # it was the service's


@pytest.mark.parametrize("name", TWO_STEPS)
def test_an_example_against_a_service(name: str, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(EXAMPLES / name))
    example["main"](address, **TWO_STEPS[name])
    printed = capsys.readouterr().out
    assert "step 1: reward" in printed and "step 2: reward" in printed
    assert name == "plain_loop.py" or "samples missing: 0" in printed


RUN = """
output: run
policy: tiny-reasoner-terse
steps: 2
tasks:
  source: {paths: [rows.jsonl], heldout_share: 0.3, reward: {function: "patient:reward", batched: false, timeout_s: 0.5}}
  prompts_per_step: 6
  samples_per_prompt: 4
rollouts: {max_tokens: 48}
optimizer: {threads: 1}
evaluation: {tasks: 5}
save_policy: false
"""
REWARD = """
import asyncio

async def reward(completion, number):
    await asyncio.sleep(30 if number % 5 == 0 else 0)
    return len(completion) % 3 - 0.5
"""


def test_a_run_on_prompts_and_rewards_of_ones_own(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Q:{i}*7\nS:", "number": i} for i in range(10, 50)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("patient.py").write_text(REWARD)
    Path("run.yaml").write_text(RUN)
    service = partial(service_of, address=address)
    summary = run("run.yaml", service)
    first, *trained = read_rows(Path("run/metrics.jsonl"))
    assert summary["trajectories"]["missing"] == 0 and first["heldout_tasks"] == 5
    assert all(-0.5 <= row["reward"] <= 1.5 and row["gradient_norm"] > 0 for row in trained)
    assert summary["unrewarded"] == sum(row["unrewarded"] for row in trained) > 0  # every fifth row, all four samples
    assert all(row["unrewarded"] % 4 == 0 and row["groups_used"] <= 6 - row["unrewarded"] // 4 for row in trained)
    Path("run/summary.json").unlink()
    Path("rows.jsonl").write_text("".join(json.dumps({**row, "number": 1}) + "\n" for row in rows))
    with pytest.raises(DataError, match="its rows are not those that the run began with"):
        run("run.yaml", service, resume=True)
