"""A pool of Ray actors behind the `RolloutBackend` interface: placement, failures, weight versions.

Invariants:
- Placement is a function of the batch alone: requests in order, actor i takes every n-th group; an actor serves one share
  at a time, in the order they came. So a run with the same seed computes the same thing however fast each actor is.
- Samples come back one by one. When an actor dies, a fresh one computes those that had not come, under the same epoch;
  each is handed out once.
- A version is staged on every actor before any takes it. An actor that dies or fails over taking it is replaced by one that
  starts from it; where every actor fails, all are replaced by ones at the old version. So the pool never serves two versions.
- An actor that does not answer in time, or holds work of a lease that is over, is killed: its work goes to a fresh one.
- Actors that die again and again without a single sample end their share with an error; they are not restarted for ever.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError

from ...errors import BlockrollError, ClusterError
from ...model.checkpoint import load_policy
from ..backend import IN_FLIGHT_POLICIES, Completed, InFlightPolicy
from ..engine import EngineConfig
from ..types import RolloutRequest
from .actor import RolloutActor

ANSWER_S = 600.0
"""Seconds an actor may take to load, or to take, a weight version."""
DEATHS = 3
"""Actors one share may lose in a row without a sample in between."""


@dataclass
class _Share:
    """What one actor is to compute, and what came of it.

    Attributes:
        done: per request the numbers of the samples that came.
        deaths: actors it lost since the last sample.
    """

    batch: list[RolloutRequest]
    epoch: int
    done: defaultdict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    failed: set[str] = field(default_factory=set)
    deaths: int = 0

    def take(self, item: Completed) -> bool:
        """Notes a sample or a failure; False when it was there already."""
        if item.trajectory is None:
            new = item.request_id not in self.failed
            self.failed.add(item.request_id)
        else:
            numbers = self.done[item.request_id]
            new = item.trajectory.sample not in numbers
            numbers.add(item.trajectory.sample)
        return new

    def left(self) -> list[RolloutRequest]:
        """Requests with samples that did not come."""
        return [r for r in self.batch if r.id not in self.failed and len(self.done[r.id]) < r.samples]


@dataclass
class _Seat:
    """An actor's place in the pool.

    Attributes:
        actor: who sits there now.
        ready, since: its answer once the policy is loaded, None from then on; when it was started, seconds of the clock.
        shares: its work; the first is being computed.
        stream, source: where the first share's samples come from, and the actor that makes them.
    """

    actor: Any
    ready: Any
    since: float
    shares: deque[_Share] = field(default_factory=deque)
    stream: Any = None
    source: Any = None


class RayCluster:
    """`actors` engines of one policy.

    Args:
        policy: shipped name or directory, readable by every actor.
        address: Ray address; None starts a Ray of its own on this machine.
        answer_seconds: how long an actor may take to load, or to take, a weight version before it is given up.
    """

    in_flight_policies = IN_FLIGHT_POLICIES

    def __init__(
        self,
        policy: str,
        config: EngineConfig,
        *,
        actors: int = 2,
        dtype: str = "float32",
        address: str | None = None,
        answer_seconds: float = ANSWER_S,
    ) -> None:
        self._answer_s = answer_seconds
        self._policy, self._config, self._dtype = policy, config, dtype
        state = load_policy(policy, dtype).state_dict()
        if _tied(state):
            state.pop("lm_head.weight")
        self._expected = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in state.items()}
        self._own_ray = not ray.is_initialized()
        if self._own_ray:
            _start_ray(address, actors)
        self._version = 0
        self._weights: Any = None  # reference to the arrays of `version`; None for those of the directory
        self._early: list[Completed] = []
        self.restarts = 0
        self._seats = [_Seat(*self._spawn()) for _ in range(actors)]
        try:
            self._ask([seat.ready for seat in self._seats])
        except BaseException:
            self.close()
            raise

    @property
    def version(self) -> int:
        """The weight version that serves."""
        return self._version

    def submit(self, batch: Sequence[RolloutRequest], epoch: int) -> None:
        """Deal a batch to the actors, group by group in turn."""
        for i, seat in enumerate(self._seats):
            if share := list(batch[i :: len(self._seats)]):
                seat.shares.append(_Share(share, epoch))
                self._start(seat)

    def poll(self, timeout: float) -> list[Completed]:
        """Finished samples; what a dead actor left unfinished starts again on a fresh one."""
        done, self._early = self._early, []
        if not any(seat.shares for seat in self._seats):
            if not done:
                time.sleep(min(timeout, 0.05))
            return done
        wait = 0.0 if done else timeout
        while True:
            streams = {seat.stream: seat for seat in self._seats if seat.stream is not None}
            ready, _ = ray.wait(list(streams), num_returns=1, timeout=wait) if streams else ([], [])
            if not ready:
                return done
            done += self._collect(streams[ready[0]])
            wait = 0.0

    def revoke(self, epoch: int) -> None:
        """Drop the shares of a lease that is over; who computes one of them is replaced, for it may hang."""
        for seat in self._seats:
            if seat.stream is not None and seat.shares[0].epoch == epoch:
                self._replace(seat)
                seat.stream = None
            seat.shares = deque(share for share in seat.shares if share.epoch != epoch)
            self._start(seat)

    def commit_weights(
        self, version: int, arrays: Mapping[str, np.ndarray], in_flight: InFlightPolicy = "finish"
    ) -> None:
        """Stage on all, then take on all; ClusterError leaves the old version serving.

        Args:
            in_flight: `finish` waits for every sample first; `keep` goes on with the old keys and values; `recompute`
                prefills unfinished samples again under the new weights; `abort` ends those that have begun.
        """
        if in_flight not in IN_FLIGHT_POLICIES:
            raise ClusterError(f"in_flight: unknown policy {in_flight!r}; use one of {', '.join(IN_FLIGHT_POLICIES)}")
        while in_flight == "finish" and any(seat.shares for seat in self._seats):
            self._early = self.poll(1.0)
        reference = self._stage(version, arrays)
        outcomes = self._each("commit", version, in_flight)
        taken = not all(isinstance(error, RayTaskError) for error in outcomes)
        if taken:
            self._version, self._weights = version, reference
        for seat, error in zip(self._seats, outcomes, strict=True):
            if error is not None:
                # It may have taken half of it. Its successor starts from what the cluster serves.
                self._replace(seat)
        if not taken:
            why = _reason(next(error for error in outcomes if error is not None))
            raise ClusterError(f"weights: no engine could take version {version} ({why}); the old one serves")

    def _stage(self, version: int, arrays: Mapping[str, np.ndarray]) -> Any:
        """The version beside the one that serves, on every actor; the reference to its arrays."""
        try:
            reference = ray.put(dict(arrays))
            failed = self._each("stage", version, reference)
            for seat, error in zip(self._seats, failed, strict=True):
                if isinstance(error, RayTaskError):
                    raise error
                if error is not None:
                    self._replace(seat)
                    ray.get(seat.actor.stage.remote(version, reference), timeout=self._answer_s)
        except RayError as error:
            for seat in self._seats:
                seat.actor.unstage.remote()
            raise ClusterError(f"weights: version {version} was refused by an engine ({_reason(error)}); "
                               "the old one serves") from error
        return reference

    def _each(self, method: str, *arguments: Any) -> list[RayError | None]:
        """Calls a method of every actor at once; what each call ended with, None where it went well."""
        calls = [getattr(seat.actor, method).remote(*arguments) for seat in self._seats]
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
        busy = sum(bool(seat.shares) for seat in self._seats)
        return {"actors": len(self._seats), "busy": busy, "loading": self._loading(), "restarts": self.restarts,
                "version": self._version}

    def close(self) -> None:
        """Stop the actors, and Ray if it was started here."""
        for seat in self._seats:
            ray.kill(seat.actor)
        self._seats = []
        if self._own_ray:
            ray.shutdown()

    def _start(self, seat: _Seat) -> None:
        """Start the stream of the first share, unless one runs."""
        if seat.stream is None and seat.shares:
            share = seat.shares[0]
            done = {r.id: frozenset(share.done[r.id]) for r in share.left()}
            seat.stream = seat.actor.run.remote(share.left(), share.epoch, done)
            seat.source = seat.actor

    def _collect(self, seat: _Seat) -> list[Completed]:
        """What a stream that is ready has to say: samples, its end, or the death of its actor."""
        share = seat.shares[0]
        try:
            items = ray.get(next(seat.stream))
        except StopIteration:
            return self._end(seat)
        except RayActorError as error:
            share.deaths += 1
            seat.stream = None
            if seat.source is seat.actor:
                self._replace(seat)
            if share.deaths >= DEATHS:
                return self._end(seat, f"{DEATHS} engines died over it ({_reason(error)}); see the logs of Ray")
            self._start(seat)
            return []
        except RayError as error:
            return self._end(seat, f"the engine failed: {_reason(error)}")
        share.deaths = 0
        return [item for item in items if share.take(item)]

    def _end(self, seat: _Seat, error: str = "it ended without every sample") -> list[Completed]:
        """The first share is over, and the next one begins; requests it leaves unfinished have failed."""
        share, seat.stream = seat.shares.popleft(), None
        self._start(seat)
        return [Completed(share.epoch, request.id, error=error) for request in share.left()]

    def _loading(self) -> int:
        """How many actors have not loaded the policy yet; one that takes too long for it is given up."""
        count = 0
        for seat in self._seats:
            if seat.ready is not None and ray.wait([seat.ready], timeout=0)[0]:
                seat.ready = None
            elif seat.ready is not None:
                count += 1
                if time.monotonic() - seat.since > self._answer_s:
                    self._replace(seat)
        return count

    def _spawn(self) -> tuple[Any, Any, float]:
        """A new actor, its answer once it has loaded the policy, and when it was started."""
        actor: Any = RolloutActor.remote(  # type: ignore[attr-defined]  # Ray's decorator is untyped
            self._policy, self._config, self._dtype, self._version, self._weights
        )
        return actor, actor.ready.remote(), time.monotonic()

    def _replace(self, seat: _Seat) -> None:
        """A fresh actor in the place of one that is dead or given up; its broken stream is found by the next poll."""
        self.restarts += 1
        ray.kill(seat.actor)
        seat.actor, seat.ready, seat.since = self._spawn()

    def _ask(self, references: list[Any]) -> None:
        try:
            ray.get(references)
        except RayError as error:
            raise ClusterError(f"cluster: an actor did not start ({_reason(error)}); see the logs of Ray") from error


def _start_ray(address: str | None, actors: int) -> None:
    """Connect to the Ray at `address`, or start one here; its logger says errors only."""
    # Ray starts its workers at niceness 15: any other process of the machine would come before the engines.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
        if colon and port.isdecimal():
            # Ray itself tries for minutes.
            socket.create_connection((host, int(port)), timeout=10.0).close()
        ray.init(address=address, include_dashboard=None if address else False, log_to_driver=False,
                 logging_level=logging.ERROR, num_cpus=None if address else max(actors, 2))  # fmt: skip
    except (OSError, RuntimeError, ValueError) as error:
        where, remedy = (f"the one at {address} cannot be reached", "check the address and that it runs") if address else \
            ("none could be started here", "see its logs in /tmp/ray")
        raise ClusterError(f"ray: {where} ({' '.join(str(error).split())[:300]}); {remedy}") from error


def _reason(error: RayError) -> str:
    """What happened, in one line, without the traceback that Ray puts into the text."""
    cause = error.cause if isinstance(error, RayTaskError) else None
    if isinstance(cause, BlockrollError):
        return str(cause)
    if cause is not None:
        return f"{type(cause).__name__}: {' '.join(str(cause).split())}"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _tied(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether the head shares the embedding's storage."""
    return state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
