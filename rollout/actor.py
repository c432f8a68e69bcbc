"""A Ray actor around one engine.

Invariants:
- A batch is taken whole and served in the order it was submitted, so what an actor computes does not depend on when its
  results are fetched.
- A weight version is staged beside the one that serves and taken between two steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray
import torch

from ..errors import RequestError
from ..model.checkpoint import load_policy
from .backend import Completed
from .engine import Engine, EngineConfig
from .types import RolloutRequest, Trajectory


@ray.remote(max_restarts=0, num_cpus=1)
class RolloutActor:
    """One engine in a process of its own. Methods run one at a time."""

    def __init__(self, policy: str, config: EngineConfig, dtype: str) -> None:
        torch.set_num_threads(1)
        self._engine = Engine(load_policy(policy, dtype), config)
        self._staged: dict[int, dict[str, torch.Tensor]] = {}

    def ready(self) -> int:
        """The weight version that serves; answers once the policy is loaded."""
        return self._engine.version

    def run(self, batch: Sequence[RolloutRequest], epoch: int) -> list[Completed]:
        """Serve a batch to its end; a request the engine refuses is reported, the others go on."""
        done: list[Completed] = []
        for request in batch:
            try:
                self._engine.add(request)
            except RequestError as error:
                done.append(Completed(epoch, request.id, error=str(error)))
        trajectories: list[Trajectory] = []
        while self._engine.has_work:
            trajectories += self._engine.step()
        return done + [Completed(epoch, t.request_id, t) for t in trajectories]

    def stage(self, version: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Hold a version's tensors ready; raises if one does not fit the policy."""
        own = self._engine.policy.state_dict()
        staged = {}
        for name, array in arrays.items():
            tensor = torch.from_numpy(np.array(array))
            if own[name].dtype == torch.bfloat16 and tensor.dtype == torch.uint16:
                tensor = tensor.view(torch.bfloat16)
            if tensor.shape != own[name].shape:
                raise RequestError("weights", f"{name} has shape {tuple(tensor.shape)}", f"send {tuple(own[name].shape)}")
            staged[name] = tensor
        self._staged = {version: staged}

    def commit(self, version: int) -> int:
        """Take the staged version."""
        self._engine.load_weights(self._staged.pop(version), version)
        return version

    def stats(self) -> dict[str, Any]:
        """Totals of the engine."""
        return {
            "forwards": self._engine.forwards,
            "decode_tokens": self._engine.decode_tokens,
            "preemptions": self._engine.scheduler.preemptions,
        }
