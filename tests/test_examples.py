"""Every file in examples/ runs, and says what it promises. Those that train against a service make two steps here."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockroll.service.config import ServiceConfig
from blockroll.service.lifecycle import serve
from blockroll.settings import parse

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SAYS = {
    "generate.py": ["Q:47+85-12", "120", "tokens per forward"],
    "constrained.py": ["'\\nA:", "stop"],
    "policy_gradient.py": ["differ by at most", "version 1"],
}
TWO_STEPS = {
    "plain_loop.py": {"steps": 2},
    "ppo.py": {"steps": 2, "prompts": 24},
    "multi_turn_tools.py": {"steps": 2, "prompts": 4, "samples": 4},
}
"""Options of those that are given the address of a service."""


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*SAYS, *TWO_STEPS}


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


@pytest.mark.parametrize("name", TWO_STEPS)
def test_an_example_against_a_service(name: str, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(EXAMPLES / name))
    example["main"](address, **TWO_STEPS[name])
    printed = capsys.readouterr().out
    assert "step 1: reward" in printed and "step 2: reward" in printed
    assert name == "plain_loop.py" or "samples missing: 0" in printed
