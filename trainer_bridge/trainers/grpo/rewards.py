"""Computes rewards, groups and advantages from trajectories.

    A_i = r_i - mean r, divided by std r + eps with `scale_rewards: group`       over the samples of one prompt that have a reward

A sample without a reward has NaN for it and for its advantage: it is no part of its group's mean, and nothing learns from it.

Legend: G groups, K samples of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ....model.tasks.task_set import AnyTask, TaskSet, answer_of
from ....rollout.types import Trajectory

_EPS = 1e-4


@dataclass(frozen=True)
class LearningSample:
    """One trajectory and its advantage. `reference`: float32[N], log p of its tokens under the starting policy; None
    unless the loss has a `kl_weight`."""

    trajectory: Trajectory
    advantage: float
    reference: np.ndarray | None = None

    @property
    def rows(self) -> int:
        """Clean rows of this sample in a pack."""
        return len(self.trajectory.prompt_tokens) + len(self.trajectory.tokens)


def rewards(source: TaskSet, tasks: Sequence[AnyTask], trajectories: Sequence[Trajectory], tokenizer: Any) -> np.ndarray:
    """rewards_GK as the tasks' source gives them; NaN where it gives none.

    Args:
        trajectories: K of each task, in the order of the tasks.
    """
    samples = len(trajectories) // len(tasks)
    answers = [answer_of(tokenizer, t.tokens, t.finish_reason) for t in trajectories]
    found = source.score([(tasks[i // samples], answer) for i, answer in enumerate(answers)])
    return np.array(found, dtype=np.float64).reshape(-1, samples)  # None becomes NaN


def advantages(rewards_GK: np.ndarray, scale: Literal["group", "none"] = "group") -> np.ndarray:
    """Advantages of rewards_GK; zero throughout a group of equal rewards."""
    known_GK = np.isfinite(rewards_GK)
    if not known_GK.all():
        found_GK = np.full_like(rewards_GK, np.nan)
        for found_K, rewards_K, known_K in zip(found_GK, rewards_GK, known_GK, strict=True):
            if known_K.any():
                found_K[known_K] = advantages(rewards_K[None, known_K], scale)[0]
        return found_GK
    centred = rewards_GK - rewards_GK.mean(axis=1, keepdims=True)
    return centred / (rewards_GK.std(axis=1, keepdims=True) + _EPS) if scale == "group" else centred


def differing(rewards_GK: np.ndarray) -> np.ndarray:
    """bool[G]: groups whose rewards, where there are some, are not all equal. The others have advantage zero."""
    most_G = np.where(np.isnan(rewards_GK), -np.inf, rewards_GK).max(axis=1)
    return most_G > np.where(np.isnan(rewards_GK), np.inf, rewards_GK).min(axis=1)
