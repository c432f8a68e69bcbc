"""The reference trainer: its loss by hand, and one small real run from config to summary."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

import blockroll
from blockroll.errors import ConfigError
from blockroll.model.conversion.config import Architecture, ConversionConfig, Stage
from blockroll.model.conversion.train import new_policy
from blockroll.model.scoring import score
from blockroll.rollout.types import Trajectory
from blockroll.settings import load_yaml
from blockroll.trainer_bridge.grpo_config import GrpoConfig, Loss
from blockroll.trainer_bridge.grpo_loss import advantages, pack_loss


@pytest.fixture(scope="module")
def policy():
    shape = Architecture(hidden_size=32, layers=2, heads=4, head_dim=8, experts=2, expert_size=32, router_size=8)
    stage = Stage(name="none", kind="ar", tokens=1)
    made = new_policy(ConversionConfig(output="unused", architecture=shape, stages=(stage,)))
    made.converted = True
    return made


def trajectory(policy, tokens, prompt=(1, 20, 30)):
    logprobs = score(policy, [(prompt, tokens)])[0]
    n = len(tokens)
    return Trajectory("r", 0, prompt, list(tokens), logprobs, logprobs, np.zeros(n, np.int32), np.zeros(n, bool), "stop", n)


def test_advantages_are_group_normalised():
    rewards = np.array([[0.0, 1.0], [1.0, 1.0]])
    assert advantages(rewards) == pytest.approx(np.array([[-1.0, 1.0], [0.0, 0.0]]), abs=1e-3)


def test_loss_on_policy_is_the_mean_advantage_and_pushes_along_it(policy):
    one = trajectory(policy, [40, 41, 42, 43, 2])
    loss = Loss(draft_weight=0.0)
    value, figures = pack_loss(policy, [(one, 0.7)], 5, 1.0, loss, random.Random(0))
    assert value.item() == pytest.approx(-0.7, abs=1e-4)
    assert figures.kl == pytest.approx(0.0, abs=1e-4)
    gradient = torch.autograd.grad(value, policy.model.norm.weight)[0]
    before = one.logprobs.sum()
    with torch.no_grad():
        policy.model.norm.weight -= 0.01 * gradient / gradient.norm()
    assert score(policy, [(one.prompt_tokens, one.tokens)])[0].sum() > before
    with torch.no_grad():
        policy.model.norm.weight += 0.01 * gradient / gradient.norm()


def test_ratio_is_clipped_and_behaviour_corrected(policy):
    one = trajectory(policy, [40, 41, 2])
    one.logprobs = one.logprobs - 1.0  # ratio e: above the clip
    one.behavior_logprobs = one.logprobs - 10.0  # weight capped
    loss = Loss(draft_weight=0.0, clip_high=0.28, importance_cap=2.0)
    value, figures = pack_loss(policy, [(one, 1.0)], 3, 1.0, loss, random.Random(0))
    assert value.item() == pytest.approx(-2.0 * 1.28, abs=1e-4)
    assert figures.clipped == 3


def test_draft_loss_trains_the_draft_and_leaves_p_its_target(policy):
    one = trajectory(policy, list(range(40, 70)))
    value, figures = pack_loss(policy, [(one, 0.0)], 30, 1.0, Loss(draft_weight=1.0), random.Random(0))
    gradient = torch.autograd.grad(value, policy.model.embed_tokens.weight)[0]
    assert gradient[policy.mask_token_id].abs().sum() > 0
    assert 0.0 < figures.overlap <= 1.0


def test_unknown_key_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("output: x\nstepz: 3\n")
    with pytest.raises(ConfigError, match=r"stepz.*steps"):
        load_yaml(path, GrpoConfig)


RUN = """
output: {output}
policy: {policy}
steps: 2
tasks: {{prompts_per_step: 4, samples_per_prompt: 2}}
rollouts: {{actors: 2, max_tokens: 24, batch: 8}}
evaluation: {{tasks: 8}}
"""


def test_small_run_end_to_end_twice(policy, tmp_path):
    """Every part is real: Ray actors, sockets, ledger, trainer. The policy is random, so rewards are not asked for."""
    policy_dir = blockroll.save_policy(policy, tmp_path / "policy")
    digests = []
    for name in ("one", "two"):
        config = tmp_path / f"{name}.yaml"
        config.write_text(RUN.format(output=tmp_path / name, policy=policy_dir))
        command = [sys.executable, "-c", "from blockroll.cli import main; main()", "grpo", str(config)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["trajectories"] == {"requested": 32, "unique": 32, "duplicates": 0, "missing": 0}
        assert summary["final_weight_version"] == summary["steps"] == 2
        assert (tmp_path / name / "report.png").read_bytes().startswith(b"\x89PNG")
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        digests.append([row["trajectories_digest"] for row in rows])
    assert digests[0] == digests[1]
