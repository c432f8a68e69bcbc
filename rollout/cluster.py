"""A pool of Ray actors behind the `RolloutBackend` interface: placement, failures, weight versions.

Invariants:
- Placement is a function of the batch alone: requests in order, actor i takes every n-th group. So a run with the same
  seed computes the same thing however fast each actor is.
- Work of an actor that died is given to a fresh one under the same epoch; the ledger refuses what comes twice.
- A version is staged on every actor before any takes it. An actor that dies in between is replaced by one that starts
  from the version the cluster is at, so the pool never serves two versions.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError, RayError

from ..errors import ClusterError
from ..model.checkpoint import load_policy
from .actor import RolloutActor
from .backend import Completed
from .engine import EngineConfig
from .types import RolloutRequest


@dataclass
class _Work:
    """What one actor is computing."""

    actor: int
    batch: list[RolloutRequest]
    epoch: int


class RayCluster:
    """`actors` engines of one policy.

    Args:
        policy: shipped name or directory, readable by every actor.
        address: Ray address; None starts a Ray of its own on this machine.
    """

    def __init__(
        self,
        policy: str,
        config: EngineConfig,
        *,
        actors: int = 2,
        dtype: str = "float32",
        address: str | None = None,
    ) -> None:
        self._policy, self._config, self._dtype = policy, config, dtype
        state = load_policy(policy, dtype).state_dict()
        if _tied(state):
            state.pop("lm_head.weight")
        self._expected = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in state.items()}
        self._own_ray = not ray.is_initialized()
        if self._own_ray:
            ray.init(address=address, include_dashboard=False, log_to_driver=False, configure_logging=False,
                     num_cpus=None if address else max(actors, 2))  # fmt: skip
        self._version = 0
        self._weights: Mapping[str, np.ndarray] | None = None
        self._work: dict[Any, _Work] = {}
        self.restarts = 0
        self._actors = [self._spawn() for _ in range(actors)]
        self._ask([actor.ready.remote() for actor in self._actors])

    @property
    def version(self) -> int:
        """The weight version that serves."""
        return self._version

    def submit(self, batch: Sequence[RolloutRequest], epoch: int) -> None:
        """Deal a batch to the actors, group by group in turn."""
        shares: list[list[RolloutRequest]] = [[] for _ in self._actors]
        for i, request in enumerate(batch):
            shares[i % len(shares)].append(request)
        for i, share in enumerate(shares):
            if share:
                self._start(_Work(i, share, epoch))

    def poll(self, timeout: float) -> list[Completed]:
        """Finished samples; a dead actor's work starts again on a fresh one."""
        if not self._work:
            time.sleep(min(timeout, 0.05))
            return []
        ready, _ = ray.wait(list(self._work), num_returns=1, timeout=timeout)
        done: list[Completed] = []
        for reference in ready:
            work = self._work.pop(reference)
            try:
                done += ray.get(reference)
            except RayActorError:
                self._replace(work.actor)
                self._start(work)
            except RayError as error:
                done += [Completed(work.epoch, r.id, error=f"the engine failed: {error}") for r in work.batch]
        return done

    def commit_weights(self, version: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Stage on all, then take on all; ClusterError leaves the old version serving."""
        reference = ray.put(dict(arrays))
        for i, actor in enumerate(self._actors):
            try:
                ray.get(actor.stage.remote(version, reference))
            except RayActorError:
                self._replace(i)
                self._ask([self._actors[i].stage.remote(version, reference)])
            except RayError as error:
                raise ClusterError(f"weights: version {version} was refused by an engine ({error}); the old one serves") \
                    from error
        # From here on the version is the cluster's: an actor that dies while taking it is replaced by one that has it.
        self._version, self._weights = version, arrays
        for i, actor in enumerate(self._actors):
            try:
                ray.get(actor.commit.remote(version))
            except RayActorError:
                self._replace(i)

    def expected_weights(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every tensor of a version."""
        return self._expected

    def stats(self) -> dict[str, float | int | str]:
        """Totals over the actors; busy actors are not waited for."""
        return {"actors": len(self._actors), "busy": len(self._work), "restarts": self.restarts, "version": self._version}

    def close(self) -> None:
        """Stop the actors, and Ray if it was started here."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._work = [], {}
        if self._own_ray:
            ray.shutdown()

    def _start(self, work: _Work) -> None:
        self._work[self._actors[work.actor].run.remote(work.batch, work.epoch)] = work

    def _spawn(self) -> Any:
        actor: Any = RolloutActor.remote(  # type: ignore[attr-defined]  # Ray's decorator is untyped
            self._policy, self._config, self._dtype
        )
        if self._weights is not None:
            actor.stage.remote(self._version, dict(self._weights))
            actor.commit.remote(self._version)
        return actor

    def _replace(self, index: int) -> None:
        self.restarts += 1
        self._actors[index] = self._spawn()

    def _ask(self, references: list[Any]) -> None:
        try:
            ray.get(references)
        except RayError as error:
            raise ClusterError(f"cluster: an actor did not start ({error}); see the logs of Ray") from error


def _tied(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether the head shares the embedding's storage."""
    return state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
