"""Where an engine runs: what its policy computes is launched on the policy's device, without gradients, and with the kernels and
threads that are meant for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Protocol, TypeVar

import torch

from ..kernels.dispatch import using
from ..model.backends import Backend
from ..model.device import current
from ..model.policy import Policy
from .steps.runner import StepRunner

Result = TypeVar("Result")


class _Config(Protocol):
    @property
    def batch_invariant(self) -> bool: ...


class Runs(Protocol):
    """An engine."""

    policy: Policy
    runner: StepRunner

    @property
    def config(self) -> _Config: ...


@contextmanager
def placed(engine: Runs) -> Iterator[None]:
    """Within it, steps of the engine may run."""
    invariant = using(batch_invariant=engine.config.batch_invariant or None)
    with torch.inference_mode(), current(engine.policy.device), invariant, _divided(engine.runner.model.backend):
        yield


@contextmanager
def _divided(backend: Backend) -> Iterator[None]:
    """A backend that divides its passes among threads has as many as torch, and torch then one: its threads would keep the
    processors busy while they wait, at every small operation."""
    threads = torch.get_num_threads()
    if backend.threads is None:
        yield
        return
    backend.threads = threads
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def where_placed(method: Callable[[Any], Result]) -> Callable[[Any], Result]:
    """A method of an engine that runs within `placed`."""

    @wraps(method)
    def run(engine: Any) -> Result:
        with placed(engine):
            return method(engine)

    return run
