"""What the bridge asks of whatever makes rollouts: the one interface between the gateway and a cluster of engines.

Invariants:
- No heavy imports: the bridge programs against this module without torch or Ray.
- The gateway makes one call at a time: `expected_weights`, and `commit_weights` of the version it comes back at, before it
  starts, all others from one thread of its own.
  It never calls `close`: who made a backend ends it.
- A lease is an epoch: work is submitted under one, comes back under the same one, and the same request submitted again
  under a higher epoch replaces the former. Epochs only grow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from .types import RolloutRequest, Trajectory

InFlightPolicy = Literal["finish", "keep", "recompute", "abort"]
IN_FLIGHT_POLICIES: tuple[InFlightPolicy, ...] = ("finish", "keep", "recompute", "abort")


@dataclass(frozen=True, slots=True)
class Completed:
    """One finished sample, or one request that cannot be served.

    Attributes:
        epoch: the epoch the work was submitted under.
        request_id: the request it belongs to.
        trajectory: the sample; None when the whole request failed.
        error: why the request cannot be served (the text of a RequestError); None for a sample.
    """

    epoch: int
    request_id: str
    trajectory: Trajectory | None = None
    error: str | None = None


class RolloutBackend(Protocol):
    """A pool of engines that serve one weight version.

    The gateway provides the policy `finish` itself: it lets the leased work end, then commits. A backend that can commit
    over sequences in flight says so with an attribute `in_flight_policies` and is then called with
    `commit_weights(version, arrays, in_flight=policy)` for each policy but `finish`.
    """

    @property
    def version(self) -> int:
        """The weight version that serves."""
        ...

    def submit(self, batch: Sequence[RolloutRequest], epoch: int) -> None:
        """Takes a whole batch under one epoch and returns at once. One call per batch, so that placement can be a
        function of the batch alone. Raises ClusterError when nothing of it was taken."""
        ...

    def poll(self, timeout: float) -> list[Completed]:
        """What finished since the last call, in any order; waits up to `timeout` seconds for the first; [] if none."""
        ...

    def revoke(self, epoch: int) -> None:
        """The lease is over: unfinished work under this epoch is not waited for and its outputs are not wanted. An engine that
        is busy with it may hang and is given up, so that the work, submitted again, goes to one that answers."""
        ...

    def commit_weights(self, version: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Every engine takes the version between two steps, or none does (ClusterError). A bfloat16 tensor comes as the
        uint16 array of its bits. The arrays belong to the backend from here on."""
        ...

    def expected_weights(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every tensor a version must hold; dtype names are NumPy's, and `bfloat16`."""
        ...

    def stats(self) -> dict[str, float | int | str]:
        """Metrics of the engines, flat, at most 256 entries. `loading`: engines that are not ready yet; while there are
        any, no lease runs out."""
        ...

    def close(self) -> None:
        """Stops the engines and frees what they hold."""
        ...
