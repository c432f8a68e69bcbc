"""Which of verl's global steps each weight version is: a Ray actor, one in a job.

A version is recorded before it is pushed, so whoever sees a token of it finds its step.
"""

from __future__ import annotations

from typing import Any

import ray

_NAME = "blockroll_weight_steps"
_KEPT = 4096
"""Versions that are remembered; samples that are further behind do not exist."""


class WeightSteps:
    """The actor's state."""

    def __init__(self) -> None:
        self._steps: dict[int, int] = {}

    def record(self, version: int, global_steps: int) -> None:
        """This version is pushed next."""
        self._steps[version] = global_steps
        while len(self._steps) > _KEPT:
            del self._steps[min(self._steps)]

    def steps(self) -> dict[int, int]:
        """Global step by version."""
        return self._steps


def weight_steps() -> Any:
    """The actor of this job; made where there is none."""
    return ray.remote(WeightSteps).options(name=_NAME, get_if_exists=True, num_cpus=0).remote()
