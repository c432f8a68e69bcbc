"""The examples that train against a service learn, and only from their rewards. Minutes each: run with `pytest -m slow -n 0`."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from blockroll.service.config import ServiceConfig
from blockroll.service.lifecycle import serve
from blockroll.settings import parse

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SPAN = 6
"""Steps at either end of a run whose rewards are compared."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    tmp_path = tmp_path_factory.mktemp("service")
    engines = {"count": 1, "device": "cpu", "num_cpus": 0.5, "batch": 32}
    values = {"policy": "tiny-reasoner-terse", "engines": engines, "schedule": {"kind": "fused", "levels": [0, 4]},
              "delivery": {"ledger": str(tmp_path / "ledger.sqlite")}}  # fmt: skip
    with serve(parse(values, ServiceConfig, "test")) as service:
        yield service.address


def gain(name: str, address: str, seed: int, shuffle: bool) -> tuple[float, float]:
    """By how much the mean reward rose from the first to the last steps, and its standard error over steps."""
    client = f"{name}-{seed}-{shuffle}"  # decides the requests' ids, and so what a run comes to
    history = np.array(runpy.run_path(str(EXAMPLES / name))["main"](address, seed=seed, name=client, shuffle=shuffle))
    first, last = history[:SPAN], history[-SPAN:]
    error = np.sqrt(first.var(ddof=1) / SPAN + last.var(ddof=1) / SPAN)
    print(f"{name} seed {seed}{' shuffled' if shuffle else ''}: {first.mean():.3f} to {last.mean():.3f}, error {error:.3f}")
    return float(last.mean() - first.mean()), float(error)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["ppo.py", "multi_turn_tools.py"])
def test_the_reward_rises(name: str, seed: int, address: str) -> None:
    rise, error = gain(name, address, seed, shuffle=False)
    assert rise >= 0.1 and rise > 2 * error


@pytest.mark.parametrize("name", ["ppo.py", "multi_turn_tools.py"])
def test_rewards_of_other_samples_teach_nothing(name: str, address: str) -> None:
    rise, error = gain(name, address, 0, shuffle=True)
    assert rise < max(2 * error, 0.1)
