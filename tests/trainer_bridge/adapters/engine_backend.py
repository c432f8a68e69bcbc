"""A backend of one real engine in the gateway's process: a service for small tests, without Ray."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from blockroll.errors import RequestError
from blockroll.rollout.backend import Completed, InFlightPolicy
from blockroll.rollout.engine import Engine
from blockroll.rollout.types import RolloutRequest


class EngineBackend:
    """Serves a shipped policy. `commits` holds the versions that were committed, and what was in flight then."""

    dispatch = "continuous"
    in_flight_policies: tuple[InFlightPolicy, ...] = ("finish", "keep")

    def __init__(self, policy: str) -> None:
        self.engine = Engine(policy, max_batch=32, device="cpu")
        self._epochs: dict[str, int] = {}
        self._refused: list[Completed] = []
        self.commits: list[tuple[int, bool]] = []

    @property
    def version(self) -> int:
        return self.engine.version

    def submit(self, batch: Sequence[RolloutRequest], epoch: int, clients: Sequence[str] | None = None) -> None:
        for request in batch:
            self._epochs[request.id] = epoch
            try:
                self.engine.add(request)
            except RequestError as error:
                self._refused.append(Completed(epoch, request.id, error=str(error)))

    def poll(self, timeout: float) -> list[Completed]:
        found, self._refused = self._refused, []
        if self.engine.has_work:
            return found + [Completed(self._epochs[t.request_id], t.request_id, t) for t in self.engine.step()]
        time.sleep(0 if found else min(timeout, 0.002))
        return found

    def revoke(self, epoch: int) -> None:
        self.cancel([name for name, of in self._epochs.items() if of == epoch])

    def cancel(self, request_ids: Sequence[str]) -> None:
        self.engine.cancel(request_ids)

    def commit_weights(self, version: int, arrays: Mapping[str, np.ndarray], in_flight: str = "keep") -> None:
        self.commits.append((version, self.engine.has_work))
        self.engine.load_weights({name: torch.from_numpy(np.array(a)) for name, a in arrays.items()}, version, in_flight)

    def expected_weights(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        state = self.engine.policy.state_dict()
        state.pop("lm_head.weight")  # tied
        return {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in state.items()}

    def stats(self) -> dict[str, float | int | str]:
        return {}

    def close(self) -> None:
        self.engine.abort()
