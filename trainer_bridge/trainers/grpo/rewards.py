"""Computes rewards, groups and advantages from trajectories.

    A_i = r_i - mean r, divided by std r + eps with `scale_rewards: group`       over the samples of one prompt

Legend: G groups, K samples of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ....model.tasks import Task, score
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


def rewards(tasks: Sequence[Task], trajectories: Sequence[Trajectory], tokenizer: Any) -> np.ndarray:
    """rewards_GK by the tasks' own verifiers; 0 for an answer that did not end by itself.

    Args:
        trajectories: K of each task, in the order of the tasks.
    """
    samples = len(trajectories) // len(tasks)
    texts = [tokenizer.decode(t.tokens, skip_special_tokens=True) if t.finish_reason == "stop" else "" for t in trajectories]
    return np.array([score(tasks[i // samples], text) for i, text in enumerate(texts)]).reshape(-1, samples)


def advantages(rewards_GK: np.ndarray, scale: Literal["group", "none"] = "group") -> np.ndarray:
    """Advantages of rewards_GK; zero throughout a group of equal rewards."""
    centred = rewards_GK - rewards_GK.mean(axis=1, keepdims=True)
    return centred / (rewards_GK.std(axis=1, keepdims=True) + _EPS) if scale == "group" else centred


def differing(rewards_GK: np.ndarray) -> np.ndarray:
    """bool[G]: groups whose rewards are not all equal. The others have advantage zero."""
    return np.ptp(rewards_GK, axis=1) > 0
