"""Holds, aborts and relabels what the engines of a pool run.

Invariants:
- A held pool deals nothing, and its engines make no step. Weight versions are staged and taken all the same.
- Every sample of an aborted work comes back once: from its engine, with the tokens that it has; or from here, without
  tokens, when no engine has it. An engine that dies, or gives samples back, changes nothing about that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from ..backend import Completed
from ..types import Trajectory
from .handle import EngineHandle
from .ray_errors import one_line
from .work import Backlog, Work


class Interruptions:
    """Of one pool.

    Args:
        engines: of the pool, a list that the pool changes.
        pump: goes on with the pool's work until one of these calls has ended, or for at most so many seconds.
        lose: gives up an engine.
        hand_out: takes a sample that ends here.

    Attributes:
        held: the pool is held.
        labels: the engines are given a version number. One that loads meanwhile becomes ready afterwards, and takes it.
    """

    def __init__(
        self, engines: list[EngineHandle], backlog: Backlog, pump: Callable[[float, Sequence[Any]], None],
        lose: Callable[[EngineHandle, str], None], hand_out: Callable[[Completed], None],
    ) -> None:  # fmt: skip
        self._engines, self._backlog, self._pump, self._lose, self._hand_out = engines, backlog, pump, lose, hand_out
        self.held = self.labels = False

    def hold(self, held: bool) -> None:
        """Holds every engine between two steps, or lets them go on. Returns when all have stopped, or go on."""
        if held != self.held:
            self.held = held
            self.each("hold", held)

    def label(self, version: int) -> None:
        """The engines that serve give their weights this version number between two steps."""
        self.labels = True
        try:
            self.each("label", version)
        finally:
            self.labels = False
        for engine in self._engines:
            if engine.phase == "ready":
                engine.version = version

    def each(self, method: str, *arguments: Any) -> None:
        """Calls a method of every engine that serves, and waits for the answers. One that fails is given up."""
        calls = {getattr(engine.actor, method).remote(*arguments): engine for engine in self._engines if engine.phase == "ready"}
        left = list(calls)
        while left := [call for call in left if calls[call].phase == "ready"]:
            self._pump(0.2, left)
            ended, left = ray.wait(left, num_returns=len(left), timeout=0)
            for call in ended:
                try:
                    ray.get(call)
                except RayError as error:
                    if calls[call].phase == "ready":
                        self._lose(calls[call], f"its {method} failed: {one_line(error)}")

    def abort(self, request_ids: Collection[str] | None) -> None:
        """Ends the unfinished samples of these requests, or of all, where they are."""
        known = self._backlog.works
        works = list(known.values()) if request_ids is None else [known[name] for name in request_ids if name in known]
        for work in works:
            work.aborted = True
        for engine in self._engines:
            if held := [work.request.id for work in works if work in engine.samples]:
                engine.actor.abort.remote(held)
        self.end_unheld(works)

    def end_unheld(self, works: Iterable[Work]) -> None:
        """Ends those samples that no engine has, of the aborted ones among these works."""
        for work in [work for work in works if work.aborted]:
            held = {number for engine in self._engines for number in engine.samples.get(work, ())}
            self._backlog.deal(work, len(work.waiting))
            for number in sorted(set(range(work.request.samples)) - work.done - held):
                item = Completed(work.epoch, work.request.id, Trajectory.aborted(work.request, number))
                if self._backlog.take(item) is not None:
                    self._hand_out(item)
