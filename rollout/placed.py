"""Where an engine runs: what its policy computes is launched on the policy's device, without gradients, and with the kernels and
threads that are meant for it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
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
    if threads == 1:
        yield
        return
    set_threads = _thread_setter()
    try:
        set_threads(1)
        yield
    finally:
        set_threads(threads)


@cache
def _thread_setter() -> Callable[[int], None]:
    """What sets torch's number of threads in the calling thread alone, or `torch.set_num_threads` where that is not possible.
    That one also sets the number that every thread of the process begins with: a thread that begins during a step of another
    thread would keep one for good. Must be called where `torch.get_num_threads` was called before."""
    try:
        library = ctypes.CDLL(torch._C.__file__)
        openmp, mkl = library.omp_set_num_threads, getattr(library, "MKL_Set_Num_Threads_Local", None)
    except (AttributeError, OSError, TypeError):
        return torch.set_num_threads

    def set_threads(count: int) -> None:
        openmp(count)
        if mkl is not None:
            mkl(count)

    before = torch.get_num_threads()
    set_threads(before + 1)
    works = torch.get_num_threads() == before + 1
    set_threads(before)
    return set_threads if works else torch.set_num_threads


def where_placed(method: Callable[[Any], Result]) -> Callable[[Any], Result]:
    """A method of an engine that runs within `placed`."""

    @wraps(method)
    def run(engine: Any) -> Result:
        with placed(engine):
            return method(engine)

    return run
