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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from ...errors import ClusterError
from ..backend import InFlightPolicy
from .handle import EngineHandle
from .ray_errors import one_line

_log = logging.getLogger(__package__)
Errors = dict[EngineHandle, RayError | None]


class WeightCommit:
    """One commit.

    Args:
        pump: goes on with the pool's work for at most so many seconds, or until one of these calls has ended.
        lose: gives up an engine.
        answer_s: seconds that staging, and taking, may take.
    """

    def __init__(self, pump: Callable[[float, Sequence[Any]], None], lose: Callable[[EngineHandle, str], None], answer_s: float
                 ) -> None:  # fmt: skip
        self._pump, self._lose, self._answer_s = pump, lose, answer_s

    def stage(
        self, engines: Sequence[EngineHandle], version: int, arrays: Mapping[str, np.ndarray]
    ) -> tuple[list[EngineHandle], Any]:
        """Stages a version on all of these engines at once. Returns those that have it, and the reference to its arrays.

        Raises:
            ClusterError: an engine refuses it, or none is left.
        """
        try:
            reference = ray.put(dict(arrays))
        except RayError as full:
            raise ClusterError(f"weights: version {version} finds no room in Ray's object store ({one_line(full)}); "
                               "the old one serves") from full
        errors = self._each(engines, lambda engine: engine.actor.stage.remote(version, reference))
        refusal = next((error for error in errors.values() if isinstance(error, RayTaskError)), None)
        for engine, error in errors.items():
            if error is not None and not isinstance(error, RayTaskError) and engine.phase == "ready":
                self._lose(engine, f"it did not stage weight version {version}: {one_line(error)}")
        staged = [engine for engine, error in errors.items() if error is None and engine.phase == "ready"]
        if refusal is not None or not staged:
            for engine in staged:
                engine.actor.unstage.remote()
            why = "no engine is left" if refusal is None else one_line(refusal)
            raise ClusterError(f"weights: version {version} was refused by an engine ({why}); the old one serves") from refusal
        return staged, reference

    def take(self, engines: Sequence[EngineHandle], version: int, in_flight: InFlightPolicy) -> Errors:
        """Has all of these engines take the version they have staged. Returns the error of each that did not."""
        return self._each(engines, lambda engine: engine.actor.commit.remote(version, in_flight))

    def _each(self, engines: Sequence[EngineHandle], call: Callable[[EngineHandle], Any]) -> Errors:
        """Makes a call to every engine at once; the error of each, None for a call that succeeded."""
        calls = {call(engine): engine for engine in engines}
        end, left = time.monotonic() + self._answer_s, list(calls)
        while left and time.monotonic() < end:
            self._pump(0.1, left)
            left = ray.wait(left, num_returns=len(left), timeout=0)[1]
        errors: Errors = {}
        for answer, engine in calls.items():
            try:
                ray.get(answer, timeout=0.0)
                errors[engine] = None
            except RayError as error:  # GetTimeoutError among them
                errors[engine] = error
        return errors
