"""A pool of Ray actors that implements `RolloutBackend`: placement and weight versions. `worker` handles failures.

Invariants:
- Placement is a function of the batch alone: of n workers, worker i takes requests i, i + n, i + 2n and so on. A worker
  serves its assignments one at a time, in the order they came. So a run with the same seed computes the same however
  fast each actor is.
- Samples come back one by one, each once, under the epoch they were submitted under.
- A version is staged on every actor before any actor takes it. An actor that dies or fails when it takes the version is
  replaced by one that starts from it. When every actor fails, all are replaced by actors at the old version. So the
  pool never serves two.
- An actor that does not answer in time, or serves a lease that is over, is killed. A fresh actor takes its place.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import ray
import torch
from ray.exceptions import RayError, RayTaskError

from ...errors import ClusterError
from ...model.checkpoint import load_policy
from ..backend import IN_FLIGHT_POLICIES, Completed, InFlightPolicy
from ..types import RolloutRequest
from .ray_errors import one_line
from .ray_start import start_ray
from .spec import EngineSpec
from .worker import ActorSpec, Worker

_log = logging.getLogger(__package__)
ANSWER_S = 600.0
"""Seconds an actor may take to load, or to take, a weight version."""
HEARTBEAT_S = 6.0
"""Seconds an engine may be silent."""
Dispatch = Literal["continuous", "ordered"]


class RayCluster:
    """Engines of one policy.

    Args:
        spec: what each engine is started with.
        engines: how many are started.
        dispatch: how work is dealt.
        address: Ray address; None starts a Ray of its own on this machine.
        answer_seconds: how long an engine may take to load, or to take, a weight version before it is replaced.
        heartbeat_seconds: how long an engine may be silent before it is replaced.
        max_engines: most engines that `scale` will ask for, by which a Ray of its own is sized; None for `engines`.
    """

    in_flight_policies = IN_FLIGHT_POLICIES

    def __init__(
        self,
        spec: EngineSpec,
        *,
        engines: int = 2,
        dispatch: Dispatch = "continuous",
        address: str | None = None,
        answer_seconds: float = ANSWER_S,
        heartbeat_seconds: float = HEARTBEAT_S,
        max_engines: int | None = None,
    ) -> None:
        self._answer_s, self.dispatch = answer_seconds, dispatch
        dtype = spec.dtype or "float32"
        state = load_policy(spec.policy, dtype).state_dict()
        if _tied(state):
            state.pop("lm_head.weight")
        self._expected = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in state.items()}
        self._own_ray = not ray.is_initialized()
        if self._own_ray:
            start_ray(address, max(engines, max_engines or 0))
        self._spec = ActorSpec(spec.policy, spec.config, dtype)
        self._early: list[Completed] = []
        self._workers = [Worker(self._spec) for _ in range(engines)]
        try:
            for worker in self._workers:
                worker.wait_ready()
        except RayError as error:
            self.close()
            raise ClusterError(f"cluster: an actor did not start ({one_line(error)}); see the logs of Ray") from error
        except BaseException:
            self.close()
            raise

    @property
    def version(self) -> int:
        """The weight version that serves."""
        return self._spec.version

    @property
    def restarts(self) -> int:
        """Actors that were replaced so far."""
        return sum(worker.restarts for worker in self._workers)

    def submit(self, batch: Sequence[RolloutRequest], epoch: int, clients: Sequence[str] | None = None) -> None:
        """Shares a batch among the workers, request by request in turn."""
        for i, worker in enumerate(self._workers):
            if part := batch[i :: len(self._workers)]:
                worker.assign(part, epoch)

    def poll(self, timeout: float) -> list[Completed]:
        """Finished samples; waits up to `timeout` seconds for the first."""
        done, self._early = self._early, []
        if not any(worker.assignments for worker in self._workers):
            if not done:
                time.sleep(min(timeout, 0.05))
            return done
        wait = 0.0 if done else timeout
        while True:
            streams = {worker.stream: worker for worker in self._workers if worker.stream is not None}
            ready, _ = ray.wait(list(streams), num_returns=1, timeout=wait) if streams else ([], [])
            if not ready:
                return done
            done += streams[ready[0]].collect()
            wait = 0.0

    def revoke(self, epoch: int) -> None:
        """Drops the assignments of a lease that is over, and replaces the actors that are serving one."""
        for worker in self._workers:
            worker.revoke(epoch)

    def commit_weights(
        self, version: int, arrays: Mapping[str, np.ndarray], in_flight: InFlightPolicy = "finish"
    ) -> None:
        """Stages the version on every actor, then has every actor take it. ClusterError leaves the old version serving.

        Args:
            in_flight: `finish` waits for every sample first; `keep` goes on with the old keys and values; `recompute`
                prefills unfinished samples again under the new weights; `abort` ends those that have a generated token.
                Samples without one are prefilled under the new weights.
        """
        if in_flight not in IN_FLIGHT_POLICIES:
            raise ClusterError(f"in_flight: unknown policy {in_flight!r}; use one of {', '.join(IN_FLIGHT_POLICIES)}")
        while in_flight == "finish" and any(worker.assignments for worker in self._workers):
            self._early = self.poll(1.0)
        reference = self._stage(version, arrays)
        outcomes = self._each("commit", version, in_flight)
        taken = not all(isinstance(error, RayTaskError) for error in outcomes)
        if taken:
            self._spec.version, self._spec.weights = version, reference
        for worker, error in zip(self._workers, outcomes, strict=True):
            if error is not None:
                # The actor may have taken part of the version. Its successor starts from what the pool serves.
                worker.replace(f"it did not take weight version {version}: {one_line(error)}")
        if not taken:
            why = one_line(next(error for error in outcomes if error is not None))
            raise ClusterError(f"weights: no engine could take version {version} ({why}); the old one serves")
        _log.info("weight version %d serves on %d engines", version, len(self._workers))

    def _stage(self, version: int, arrays: Mapping[str, np.ndarray]) -> Any:
        """Stages a version on every actor, beside the one that serves; returns the reference to its arrays."""
        try:
            reference = ray.put(dict(arrays))
            failed = self._each("stage", version, reference)
            for worker, error in zip(self._workers, failed, strict=True):
                if isinstance(error, RayTaskError):
                    raise error
                if error is not None:
                    worker.replace(f"it did not stage weight version {version}: {one_line(error)}")
                    ray.get(worker.actor.stage.remote(version, reference), timeout=self._answer_s)
        except RayError as error:
            for worker in self._workers:
                worker.actor.unstage.remote()
            raise ClusterError(f"weights: version {version} was refused by an engine ({one_line(error)}); "
                               "the old one serves") from error
        return reference

    def _each(self, method: str, *arguments: Any) -> list[RayError | None]:
        """Calls a method of every actor at once; returns the error of each call, None for a call that succeeded."""
        calls = [getattr(worker.actor, method).remote(*arguments) for worker in self._workers]
        end, errors = time.monotonic() + self._answer_s, list[RayError | None]()
        for call in calls:
            try:
                ray.get(call, timeout=max(0.0, end - time.monotonic()))
                errors.append(None)
            except RayError as error:
                errors.append(error)
        return errors

    def expected_weights(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every tensor of a version."""
        return self._expected

    def stats(self) -> dict[str, float | int | str]:
        """Figures of the pool."""
        loading = sum(worker.is_loading(self._answer_s) for worker in self._workers)
        return {"actors": len(self._workers), "busy": sum(bool(worker.assignments) for worker in self._workers),
                "loading": loading, "restarts": self.restarts, "version": self.version}

    def close(self) -> None:
        """Stops the actors, and Ray if it was started here."""
        for worker in self._workers:
            ray.kill(worker.actor)
        self._workers = []
        if self._own_ray:
            ray.shutdown()


def _tied(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether the head shares the embedding's storage."""
    return state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
