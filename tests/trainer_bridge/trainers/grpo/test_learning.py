"""The first command of the README learns, and only from its rewards. Minutes each: run with `pytest -m slow -n 0`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from blockroll.service.lifecycle import serve
from blockroll.trainer_bridge.trainers.grpo import trainer
from blockroll.trainer_bridge.trainers.grpo.run import run

ROOT = Path(__file__).resolve().parents[4]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def quickstart(place: Path, seed: int) -> Path:
    """The quick start's configuration with another seed, its results under `place`."""
    config = yaml.safe_load((ROOT / "configs/grpo/quickstart.yaml").read_text())
    config |= {"output": str(place / "run"), "seed": seed, "save_policy": False}
    path = place / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def gains(summary: dict) -> dict[str, float]:
    """By how much held-out accuracy, its greedy twin and the reward rose."""
    return {
        "accuracy": summary["heldout_accuracy_after"] - summary["heldout_accuracy_before"],
        "greedy": summary["heldout_greedy_after"] - summary["heldout_greedy_before"],
        "reward": summary["reward_last_10"] - summary["reward_first_10"],
    }


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_quickstart_learns(tmp_path: Path, seed: int) -> None:
    summary = run(quickstart(tmp_path, seed), serve)
    gain = gains(summary)
    print(seed, gain, summary)
    assert summary["heldout_tasks"] >= 400
    assert gain["accuracy"] >= 0.10 and gain["greedy"] >= 0.04 and gain["reward"] >= 0.08
    assert summary["heldout_greedy_tokens_after"] > 2 * summary["heldout_greedy_tokens_before"]  # it writes the steps
    assert summary["seconds"] <= 600


def errors(summary: dict) -> dict[str, float]:
    """Standard errors of the gains, as of independent tasks."""
    pairs = {"accuracy": ("heldout_accuracy_before", "heldout_accuracy_after"), "reward": ("reward_first_10", "reward_last_10"),
             "greedy": ("heldout_greedy_before", "heldout_greedy_after")}  # fmt: skip
    return {name: sum(summary[f"{key}_standard_error"] ** 2 for key in keys) ** 0.5 for name, keys in pairs.items()}


def test_rewards_of_other_samples_teach_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shuffled among the samples of a group, rewards do not say what was right: over three seeds no figure rises by two standard
    errors, nor by as much as a run that learns must show."""
    rng, advantages = np.random.default_rng(0), trainer.advantages
    monkeypatch.setattr(trainer, "advantages", lambda r, scale: rng.permuted(advantages(r, scale), axis=1))
    summaries = []
    for seed in range(3):
        (tmp_path / str(seed)).mkdir()
        summaries.append(run(quickstart(tmp_path / str(seed), seed), serve))
        print(seed, gains(summaries[-1]), errors(summaries[-1]))
    for name, most in (("accuracy", 0.05), ("greedy", 0.04), ("reward", 0.04)):
        some = [gains(s)[name] for s in summaries]
        # Of the tasks drawn, or of the runs among themselves, whichever is larger: a policy pushed at random drifts a little.
        drawn = np.mean([errors(s)[name] ** 2 for s in summaries]) ** 0.5 / len(some) ** 0.5
        error = max(drawn, np.std(some, ddof=1) / len(some) ** 0.5)
        assert np.mean(some) < 2 * error and np.mean(some) < most, (name, some, error)
