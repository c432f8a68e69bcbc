"""Requests that fail while they are decoded: those with a log-probability that is no finite number.

Weights whose numbers are finite can still overflow on the way to logits. Such logits decode to tokens that mean nothing, and the
log-probabilities tell. They are looked at once per sample, when it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import numpy as np

from ..errors import RequestError
from .sequence import Sample
from .types import Trajectory

_RECORDED = ("logprobs", "behavior_logprobs", "support_logmass", "top_logprobs", "prompt_logprobs", "prompt_top_logprobs")


def trajectories(
    ended: Iterable[Sample], failed: dict[str, RequestError], cancel: Callable[[Collection[str]], object]
) -> list[Trajectory]:
    """The trajectories of samples that ended. A request with a log-probability that is not finite fails and has none.

    Args:
        failed: gains the requests that fail, by id.
        cancel: ends their other samples.
    """
    found: list[Trajectory] = []
    new: dict[str, RequestError] = {}
    for sample in ended:
        trajectory = sample.trajectory()
        found.append(trajectory)
        others = trajectory.top_logprobs is not None or trajectory.prompt_logprobs is not None
        if (others or not sample.log.surely_finite) and (error := _error(trajectory)) is not None:
            new.setdefault(trajectory.request_id, error)
    if new:
        failed |= new
        cancel(new)
    return [trajectory for trajectory in found if trajectory.request_id not in new]


def _error(trajectory: Trajectory) -> RequestError | None:
    """What is wrong with a trajectory's numbers."""
    for name in _RECORDED:
        values = getattr(trajectory, name)
        if values is not None and not (finite := np.isfinite(values)).all():
            place = int(np.argwhere(~finite)[0, 0])
            return RequestError(
                "logprobs", f"{name} of request {trajectory.request_id!r}, sample {trajectory.sample}, is "
                f"{np.asarray(values)[place].min()} at token {place}",
                "use weights, and a dtype, that keep the policy's logits finite",
            )  # fmt: skip
    return None


def unless_failed(done: list[Trajectory], failed: dict[str, RequestError]) -> list[Trajectory]:
    """The trajectories; raises the first of `failed`, which is emptied, where there are any."""
    if not failed:
        return done
    error = next(iter(failed.values()))
    failed.clear()
    raise error
