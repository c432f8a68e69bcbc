"""A Ray actor around one engine.

Invariants:
- An actor serves one assignment at a time, whole and in its order, so what it computes does not depend on when its
  results are fetched. Samples leave as they finish, by a stream.
- A weight version is staged beside the one that serves and taken between two steps, also in the middle of an
  assignment.
- An assignment that ends early leaves nothing in the engine.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import ray
import torch

from ...errors import RequestError
from ...model.checkpoint import load_policy
from ..backend import Completed, InFlightPolicy
from ..engine import Engine, EngineConfig
from ..types import RolloutRequest


@ray.remote(max_restarts=0, num_cpus=1, concurrency_groups={"control": 1})
class RolloutActor:
    """One engine in a process of its own. `run` has one thread; staging, commits and figures have another.

    Args:
        version, arrays: the weights to serve; None for those of `policy` itself.
    """

    def __init__(
        self, policy: str, config: EngineConfig, dtype: str, version: int, arrays: Mapping[str, np.ndarray] | None
    ) -> None:
        torch.set_num_threads(1)
        self._engine = Engine(load_policy(policy, dtype), config)
        self._staged: dict[int, Mapping[str, torch.Tensor]] = {}
        self._between_steps = threading.Lock()
        self._epoch: int | None = None
        self._ended: list[Completed] = []
        if arrays is not None:
            self._engine.load_weights(self._fitting(arrays, version), version)

    def ready(self) -> int:
        """The weight version that serves. The call returns once the policy is loaded."""
        return self._engine.version

    @ray.method(num_returns="streaming")
    def run(
        self, batch: Sequence[RolloutRequest], epoch: int, done: Mapping[str, frozenset[int]]
    ) -> Iterator[list[Completed]]:
        """Serves an assignment to its end. A request that the engine refuses is reported, and the others go on.

        Args:
            done: per request id, the numbers of the samples that are not wanted because they have come.
        """
        torch.set_num_threads(1)  # OpenMP's setting belongs to the thread
        refused = []
        try:
            with self._between_steps:
                self._epoch = epoch
                for request in batch:
                    try:
                        self._engine.add(request, without=done.get(request.id, frozenset()))
                    except RequestError as error:
                        refused.append(Completed(epoch, request.id, error=str(error)))
            if refused:
                yield refused
            while True:
                with self._between_steps:
                    if not self._engine.has_work and not self._ended:
                        return
                    finished = self._engine.step() if self._engine.has_work else []
                    completed = self._ended + [Completed(epoch, t.request_id, t) for t in finished]
                    completed += [Completed(epoch, name, error=str(error)) for name, error in self._engine.failed.items()]
                    self._ended = []
                    self._engine.failed.clear()
                if completed:
                    yield completed
        finally:
            with self._between_steps:
                self._engine.abort()
                self._epoch, self._ended = None, []

    @ray.method(concurrency_group="control")
    def stage(self, version: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Stages a version's tensors; raises if one does not fit the policy."""
        self._staged = {version: self._fitting(arrays, version)}

    @ray.method(concurrency_group="control")
    def unstage(self) -> None:
        """Frees what is staged."""
        self._staged = {}

    @ray.method(concurrency_group="control")
    def commit(self, version: int, in_flight: InFlightPolicy) -> int:
        """Takes the staged version between two steps.

        Args: in_flight: what happens to unfinished samples. `keep`, `recompute`: see `Engine.load_weights`. `abort`:
            those that have a generated token end where they are. `finish`: the caller has waited until there are none.
        """
        with self._between_steps:
            tensors = self._staged.pop(version)
            if in_flight == "abort" and self._epoch is not None:
                self._ended += [Completed(self._epoch, t.request_id, t) for t in self._engine.abort_begun()]
            self._engine.load_weights(tensors, version, "recompute" if in_flight == "recompute" else "keep")
        return version

    @ray.method(concurrency_group="control")
    def stats(self) -> dict[str, Any]:
        """Process id, and totals of the engine."""
        return {
            "pid": os.getpid(),
            "forwards": self._engine.forwards,
            "decode_tokens": self._engine.decode_tokens,
            "preemptions": self._engine.scheduler.preemptions,
        }

    def _fitting(self, arrays: Mapping[str, np.ndarray], version: int) -> Mapping[str, torch.Tensor]:
        own = self._engine.policy.state_dict()
        tensors = {}
        for name, array in arrays.items():
            tensor = torch.from_numpy(np.array(array))
            if tensor.dtype == torch.uint16 and name in own and own[name].dtype == torch.bfloat16:
                tensor = tensor.view(torch.bfloat16)
            tensors[name] = tensor
        return self._engine.check_weights(tensors, version)
