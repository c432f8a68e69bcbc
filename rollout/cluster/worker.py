"""A place of the pool: the actor that holds it now, and the assignments it serves one after the other.

Invariants:
- The first assignment is being served, by a stream of samples. When its actor dies, a fresh actor serves the samples
  that have not come. Each sample is handed out once.
- An assignment over which actors die again and again, without a sample in between, ends with an error.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from ..backend import Completed
from ..engine import EngineConfig
from ..types import RolloutRequest
from .actor import RolloutActor
from .assignment import Assignment
from .ray_errors import one_line

_log = logging.getLogger(__package__)
DEATHS = 3
"""Actors one assignment may lose in a row without a sample in between."""


@dataclass
class ActorSpec:
    """What actors are started with, the same for all of a pool.

    Attributes:
        version: the weight version that serves.
        weights: reference to the arrays of `version`; None for the weights of the policy's directory.
    """

    policy: str
    config: EngineConfig
    dtype: str
    version: int = 0
    weights: Any = None

    def start(self) -> Any:
        """A new actor, which begins to load its policy."""
        return RolloutActor.remote(  # type: ignore[attr-defined]  # Ray's decorator is untyped
            self.policy, self.config, self.dtype, self.version, self.weights)


class Worker:
    """One place of the pool.

    Attributes:
        actor: the actor that holds it.
        assignments: its work; the first is being served.
        stream: where the first assignment's samples come from; None when nothing is served.
        restarts: how often its actor was replaced.
    """

    def __init__(self, spec: ActorSpec) -> None:
        self._spec = spec
        self.assignments: deque[Assignment] = deque()
        self.stream: Any = None
        self.restarts = 0
        self._streaming: Any = None  # the actor that makes `stream`
        self.actor: Any = None
        self._ready: Any = None  # the actor's answer once it has loaded its policy; None once it has come
        self._start_actor()

    def assign(self, batch: Sequence[RolloutRequest], epoch: int) -> None:
        """Adds an assignment behind the others."""
        self.assignments.append(Assignment(list(batch), epoch))
        self._serve()

    def collect(self) -> list[Completed]:
        """What a stream that is ready has brought: samples, its end, or the death of its actor."""
        assignment = self.assignments[0]
        try:
            items = ray.get(next(self.stream))
        except StopIteration:
            return self._end()
        except RayActorError as error:
            assignment.deaths += 1
            self.stream = None
            if self._streaming is self.actor:
                self.replace(f"it died: {one_line(error)}")
            if assignment.deaths >= DEATHS:
                return self._end(f"{DEATHS} engines died over it ({one_line(error)}); see the logs of Ray")
            self._serve()
            return []
        except RayError as error:
            return self._end(f"the engine failed: {one_line(error)}")
        assignment.deaths = 0
        return [item for item in items if assignment.take(item)]

    def revoke(self, epoch: int) -> None:
        """Drops the assignments of a lease. An actor that is serving one is replaced, since it may hang."""
        if self.stream is not None and self.assignments[0].epoch == epoch:
            self.replace(f"lease {epoch} is over")
            self.stream = None
        self.assignments = deque(a for a in self.assignments if a.epoch != epoch)
        self._serve()

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Ends requests. The actor drops those it is serving between two steps; what it finished before is dropped here."""
        ended = [name for assignment in self.assignments for name in assignment.cancel(request_ids)]
        if ended:
            self.actor.cancel.remote(ended)

    def replace(self, why: str) -> None:
        """Kills the actor and starts a fresh one. A stream of the killed actor breaks, which `collect` finds."""
        _log.warning("an engine is replaced: %s", why)
        self.restarts += 1
        ray.kill(self.actor)
        self._start_actor()

    def wait_ready(self) -> None:
        """Waits until the actor has loaded its policy. Raises RayError."""
        ray.get(self._ready)

    def is_loading(self, most_s: float) -> bool:
        """Whether the actor is loading its policy. One that has been loading for more than `most_s` seconds is
        replaced."""
        if self._ready is None:
            return False
        if ray.wait([self._ready], timeout=0)[0]:
            self._ready = None
            return False
        if time.monotonic() - self._started > most_s:
            self.replace(f"it has not loaded its policy in {most_s:g} s")
        return True

    def _start_actor(self) -> None:
        self.actor, self._started = self._spec.start(), time.monotonic()
        self._ready = self.actor.ready.remote()

    def _serve(self) -> None:
        """Starts the stream of the first assignment, unless one runs."""
        if self.stream is None and self.assignments:
            first = self.assignments[0]
            self.stream = self.actor.run.remote(first.unfinished(), first.epoch, first.unwanted())
            self._streaming = self.actor

    def _end(self, error: str = "it ended without every sample") -> list[Completed]:
        """Ends the first assignment and starts the next one. Requests that are unfinished have failed."""
        ended, self.stream = self.assignments.popleft(), None
        self._serve()
        return [Completed(ended.epoch, request.id, error=error) for request in ended.unfinished()]
