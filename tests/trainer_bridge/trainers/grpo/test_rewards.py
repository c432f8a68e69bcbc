"""Groups and advantages where some samples have no reward."""

from __future__ import annotations

import numpy as np
import pytest

from blockroll.trainer_bridge.trainers.grpo.rewards import advantages, differing

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
