"""The interface between the gateway and a cluster of engines.

Invariants:
- The bridge imports this module without torch or Ray.
- The gateway makes one call at a time. Before it starts it calls `expected_weights`, and `commit_weights` with the
  version it restarts at; all other calls come from one thread. It never calls `close`: the creator of a backend closes
  it.
- A lease is an epoch: work is submitted under an epoch and comes back under the same one. A request that is submitted
  again under a higher epoch replaces the former. Epochs only grow.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from .types import RolloutRequest, Trajectory

Dispatch = Literal["continuous", "ordered"]
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


@dataclass(frozen=True, slots=True)
class Progress:
    """Tokens that an unfinished sample has committed since its last report. A sample whose engine died begins anew on another
    one, and is reported from its first token again.

    Attributes:
        start: generated tokens before these.
        tokens, logprobs, behavior_logprobs, versions: one entry per token, as in `Trajectory`.
        top: the most probable tokens at each token and their log-probabilities; empty where they are not wanted.
        forwards: forward passes of decoding so far.
    """

    request_id: str
    sample: int
    start: int
    tokens: list[int]
    logprobs: list[float]
    behavior_logprobs: list[float]
    versions: list[int]
    top: list[tuple[list[int], list[float]]]
    forwards: int


class RolloutBackend(Protocol):
    """A pool of engines that serve one weight version.

    The gateway implements the policy `finish` itself: it waits until the leased work has ended, then commits. A backend
    that can commit while sequences are in flight has an attribute `in_flight_policies`, and is called with
    `commit_weights(version, arrays, in_flight=policy)` for every policy but `finish`.

    A backend whose attribute `takes_changes` is true is called with `changed`, the names of the tensors that are not those of the
    version that serves; None: they may all be. The arrays of the others may be slow to read. One that has a method
    `room_for_weights(expected)` gives the arrays that a version is received into; it is called from another thread.

    A backend that can be paused is an `InterruptibleBackend` too.

    A backend that can report unfinished samples has a set `watched` of request ids, which another thread changes, and
    `take_progress()`, which returns the `Progress` that came with the last `poll`. A request has to be watched before it is
    submitted.
    """

    @property
    def version(self) -> int:
        """The weight version that serves."""
        ...

    @property
    def dispatch(self) -> Dispatch:
        """`ordered`: a batch is submitted whole, in one call, so that placement can be a function of the batch alone.
        `continuous`: requests of several clients are submitted in turn."""
        ...

    def submit(self, batch: Sequence[RolloutRequest], epoch: int, clients: Sequence[str] | None = None) -> None:
        """Takes requests under one epoch and returns at once. Raises ClusterError when nothing of them was taken.

        Args: clients: whose each request is; clients share the engines fairly.
        """
        ...

    def poll(self, timeout: float) -> list[Completed]:
        """What has finished since the last call, in any order; waits up to `timeout` seconds for the first."""
        ...

    def revoke(self, epoch: int) -> None:
        """Ends a lease: its unfinished work is dropped. An engine that made no step with it lately may hang and is
        replaced, so that the work, once it is submitted again, goes to an engine that answers."""
        ...

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Ends the unfinished samples of these requests; nothing more comes back for them. Unknown ids are ignored. A
        request may be submitted again later, under a higher epoch."""
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


@runtime_checkable
class InterruptibleBackend(Protocol):
    """What a backend offers so that trainers can pause, abort and relabel what it runs."""

    def hold(self, held: bool) -> None:
        """Holds every engine between two steps, or lets them go on; returns when all have stopped, or go on. A held backend takes
        work and begins none of it. Weight versions are committed all the same, but for `finish` with work in flight."""
        ...

    def abort(self, request_ids: Collection[str] | None = None) -> None:
        """Ends the unfinished samples of these requests, or of all, where they are: each comes back with the tokens that it
        has and the finish reason `abort`. Unknown ids are ignored."""
        ...

    def reset_prefix_cache(self) -> None:
        """Forgets K/V that is kept for other requests. Samples that run keep their own."""
        ...

    def label_version(self, version: int) -> None:
        """The weights that serve have this number from now on, between two steps. Nothing ends, and no K/V is forgotten."""
        ...
