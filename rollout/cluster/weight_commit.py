"""A weight version goes to all engines, or to none.

Invariants:
- Every ready engine has staged a version before any takes it. One that loads meanwhile waits, and takes it afterwards.
- An engine that dies or fails when it takes the version is given up; its next process starts from the pool's version. When every
  engine fails, all are given up and the old version serves. So the pool never serves two.
- While a version is staged the pool goes on: it reads samples and deals work.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from ...errors import ClusterError
from ..backend import InFlightPolicy
from .handle import EngineHandle
from .ray_errors import one_line
from .weight_transport import TransferBroken, WeightTransport

_log = logging.getLogger(__package__)
Errors = dict[EngineHandle, RayError | None]


class WeightCommit:
    """One commit.

    Args:
        transport: brings the tensors into the engines.
        pump: goes on with the pool's work for at most so many seconds, or until one of these calls has ended.
        lose: gives up an engine.
        answer_s: seconds that staging, and taking, may take.
    """

    def __init__(self, transport: WeightTransport, pump: Callable[[float, Sequence[Any]], None],
                 lose: Callable[[EngineHandle, str], None], answer_s: float) -> None:  # fmt: skip
        self._transport, self._pump, self._lose, self._answer_s = transport, pump, lose, answer_s

    def stage(
        self, engines: Sequence[EngineHandle], version: int, arrays: Mapping[str, np.ndarray],
        changed: Collection[str] | None = None,
    ) -> list[EngineHandle]:
        """Stages a version on all of these engines at once. Returns those that have it.

        Args: changed: the names of the tensors that are not those which serve; None for all.

        Raises:
            ClusterError: the transport or an engine refuses it, or no engine is left.
        """
        travel = frozenset(arrays if changed is None else changed)
        self._transport.stage(arrays, travel)
        staged: list[EngineHandle] = []
        left, refusal = list(engines), None
        while left and refusal is None:
            tickets = self._transport.tickets(len(left)) if travel else [None] * len(left)
            errors = self._each({engine: engine.actor.stage.remote(version, ticket, changed)
                                 for engine, ticket in zip(left, tickets, strict=True)})
            again = []
            for engine, error in errors.items():
                if isinstance(error, RayTaskError) and isinstance(error.cause, TransferBroken):
                    again.append(engine)
                elif isinstance(error, RayTaskError):
                    refusal = error
                elif error is not None and engine.phase == "ready":
                    self._lose(engine, f"it did not stage weight version {version}: {one_line(error)}")
            staged += [engine for engine, error in errors.items() if error is None]
            if len(again) == len(left):
                refusal = errors[again[0]]  # nobody died of it: it would break again
            left = [engine for engine in again if engine.phase == "ready"]
        staged = [engine for engine in staged if engine.phase == "ready"]
        if refusal is not None or not staged:
            for engine in staged:
                engine.actor.unstage.remote()
            why = "no engine is left" if refusal is None else one_line(refusal)
            raise ClusterError(f"weights: version {version} was refused by an engine ({why}); the old one serves") from refusal
        return staged

    def take(self, engines: Sequence[EngineHandle], version: int, in_flight: InFlightPolicy) -> Errors:
        """Has all of these engines take the version they have staged. Returns the error of each that did not."""
        return self._each({engine: engine.actor.commit.remote(version, in_flight) for engine in engines})

    def _each(self, answers: Mapping[EngineHandle, Any]) -> Errors:
        """Waits for the answer of each engine; the error of each, None for a call that succeeded."""
        calls = {answer: engine for engine, answer in answers.items()}
        end, left = time.monotonic() + self._answer_s, list(calls)
        while left and time.monotonic() < end:
            self._pump(0.1, left)
            ended, left = ray.wait(left, num_returns=len(left), timeout=0)
            if left and any(_failed(answer) for answer in ended):
                self._transport.cut()  # the others may wait for what does not come
        errors: Errors = {}
        for answer, engine in calls.items():
            try:
                ray.get(answer, timeout=0.0)
                errors[engine] = None
            except RayError as error:  # GetTimeoutError among them
                errors[engine] = error
        return errors


def _failed(answer: Any) -> bool:
    try:
        ray.get(answer, timeout=0.0)
    except RayError:
        return True
    return False
