"""A run goes on from its checkpoint to the same weights, whatever has had a gradient by then."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from bridge_parts import ToyBackend

from blockroll.errors import CheckpointError
from blockroll.model.checkpoint import load_policy
from blockroll.model.scoring import score
from blockroll.model.tasks.task_set import ReasoningGym
from blockroll.rollout.types import Trajectory
from blockroll.trainer_bridge.client import connect
from blockroll.trainer_bridge.trainers.grpo.attachment import Attachment
from blockroll.trainer_bridge.trainers.grpo.checkpoint import load_checkpoint, save_checkpoint
from blockroll.trainer_bridge.trainers.grpo.config import GrpoConfig
from blockroll.trainer_bridge.trainers.grpo.learner import Learner
from blockroll.trainer_bridge.trainers.grpo.metrics import METRICS, read_rows
from blockroll.trainer_bridge.trainers.grpo.report import Display
from blockroll.trainer_bridge.trainers.grpo.rewards import LearningSample
from blockroll.trainer_bridge.trainers.grpo.trainer import Trainer


@pytest.fixture(scope="module")
def policy():
    return load_policy("tiny-reasoner-terse")


@pytest.fixture(scope="module")
def samples(policy):
    import numpy as np

    draw, made = random.Random(0), []
    for i in range(8):
        prompt, tokens = (1, 20, 30 + i), [draw.randrange(20, 200) for _ in range(draw.randint(3, 12))]
        logprobs, n = score(policy, [(prompt, tokens)])[0], len(tokens)
        versions, drafted = np.zeros(n, np.int32), np.zeros(n, bool)
        trajectory = Trajectory(f"r{i}", 0, prompt, tokens, logprobs, logprobs, versions, drafted, "stop", n)
        made.append(LearningSample(trajectory, draw.gauss(0, 1)))
    return made


def weights(learner: Learner) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in learner.policy.parameters()])


@pytest.mark.parametrize("draft_weight", [0.0, 0.3])
@pytest.mark.parametrize("trained", [0, 1, 2])
def test_a_learner_goes_on_from_its_checkpoint(policy, samples, tmp_path, draft_weight, trained):
    """After no update at all, and where the Markov head has never had a gradient (draft_weight 0)."""
    config = GrpoConfig(output="unused", steps=5, loss={"draft_weight": draft_weight}, optimizer={"threads": 1})
    whole = Learner(copy.deepcopy(policy), config)
    for step in range(1, 4):
        whole.step(step, samples if step <= trained else [])
        save_checkpoint(tmp_path / f"{step}.safetensors", whole, step, {"step": step})
    resumed = Learner(copy.deepcopy(policy), config)
    assert load_checkpoint(tmp_path / "3.safetensors", resumed) == (3, {"step": 3})
    for learner in (whole, resumed):
        for step in (4, 5):
            learner.step(step, samples)
    assert torch.equal(weights(whole), weights(resumed))


def test_a_checkpoint_of_another_policy_changes_nothing(policy, tmp_path):
    config = GrpoConfig(output="unused", optimizer={"threads": 1})
    save_checkpoint(tmp_path / "one.safetensors", Learner(copy.deepcopy(policy), config), 1, {})
    other = copy.deepcopy(policy)
    other.add_markov(8, torch.Generator().manual_seed(0))
    learner = Learner(other, config)
    before = weights(learner).clone()
    with pytest.raises(CheckpointError, match="one.safetensors cannot be resumed .*another policy"):
        load_checkpoint(tmp_path / "one.safetensors", learner)
    (tmp_path / "broken.safetensors").write_bytes((tmp_path / "one.safetensors").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="broken.safetensors cannot be resumed"):
        load_checkpoint(tmp_path / "broken.safetensors", learner)
    assert torch.equal(weights(learner), before)


def test_a_run_that_is_killed_before_its_first_checkpoint_goes_on_from_the_start(policy, serve, tmp_path):
    """Killed when the line of step 0 was on disk, and its trajectories were not acknowledged."""
    config = GrpoConfig(output=str(tmp_path), steps=1, evaluation={"tasks": 2}, optimizer={"threads": 1})
    address, acknowledged = serve(ToyBackend(longest=1000)).address, list[list[str]]()

    def trainer(client, kill):
        def acknowledge(done):
            acknowledged.append([each.request_id if kill else each.id for each in done])
            if kill:
                raise KeyboardInterrupt

        client.acknowledge = acknowledge
        return Trainer(config, copy.deepcopy(policy), client, Path(tmp_path), Display(config), Attachment(),
                       ReasoningGym(config.tasks.families))  # fmt: skip

    with connect(address, client_id="grpo", ack="manual") as client, pytest.raises(KeyboardInterrupt):
        trainer(client, kill=True).train()
    rows = read_rows(tmp_path / METRICS)
    with connect(address, client_id="grpo", ack="manual") as client:
        resumed = trainer(client, kill=False)
        resumed.resume()
    assert resumed._done == 0 and [row["step"] for row in rows] == [0] and read_rows(tmp_path / METRICS) == rows
    assert set(acknowledged[1]) == set(acknowledged[0]) and acknowledged[0]
