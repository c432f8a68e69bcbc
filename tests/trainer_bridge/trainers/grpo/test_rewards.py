"""Groups, advantages and logged lines where some samples have no reward."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from blockroll.rollout.inspection.run import Run
from blockroll.rollout.types import Trajectory
from blockroll.trainer_bridge.trainers.grpo.rewards import advantages, differing
from blockroll.trainer_bridge.trainers.grpo.rollout_log import log_groups

NAN = float("nan")
REWARDS_GK = np.array([[1.0, 0.0, NAN, 1.0], [NAN, NAN, NAN, NAN], [NAN, 2.0, 2.0, 2.0], [0.5, 0.0, 0.25, 0.25],
                       [NAN, 1.0, NAN, NAN]])  # fmt: skip


@pytest.mark.parametrize("scale", ["group", "none"])
def test_a_sample_without_a_reward_is_no_part_of_its_group(scale) -> None:
    found_GK = advantages(REWARDS_GK, scale)
    for found_K, rewards_K in zip(found_GK, REWARDS_GK, strict=True):
        known_K = np.isfinite(rewards_K)
        assert np.isnan(found_K[~known_K]).all()
        if known_K.any():
            assert found_K[known_K].tolist() == advantages(rewards_K[None, known_K], scale)[0].tolist()
            assert abs(found_K[known_K].sum()) < 1e-12


def test_groups_differ_where_the_rewards_that_are_there_do() -> None:
    assert differing(REWARDS_GK).tolist() == [True, False, False, True, False]


def test_a_sample_without_a_reward_is_logged_without_one(tmp_path: Path) -> None:
    ones, rewards_K = np.ones(1, dtype=np.float32), np.array([1.0, NAN, 0.0])
    group = [Trajectory("step-00001/00/00000", i, (1,), [5], -ones, -ones, ones.astype(np.int32), ones.astype(bool), "stop", 1)
             for i in range(3)]  # fmt: skip
    log_groups(tmp_path / "rollouts.jsonl", 1, [(group, rewards_K)], advantages(rewards_K[None]), None)
    run = Run.find(tmp_path, 10)
    run.read()
    assert [sample.reward for sample in run.samples] == [1.0, None, 0.0]
    assert [sample.advantage is None for sample in run.samples] == [False, True, False]
