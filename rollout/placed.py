"""Where an engine runs: what its policy computes is launched on the policy's device, without gradients, and with the kernels that
its configuration asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Protocol, TypeVar

import torch

from ..kernels.dispatch import using
from ..model.device import current
from ..model.policy import Policy

Result = TypeVar("Result")


class _Config(Protocol):
    @property
    def batch_invariant(self) -> bool: ...


class Runs(Protocol):
    """An engine."""

    policy: Policy

    @property
    def config(self) -> _Config: ...


@contextmanager
def placed(engine: Runs) -> Iterator[None]:
    """Within it, steps of the engine may run."""
    with torch.inference_mode(), current(engine.policy.device), using(batch_invariant=engine.config.batch_invariant or None):
        yield


def where_placed(method: Callable[[Any], Result]) -> Callable[[Any], Result]:
    """A method of an engine that runs within `placed`."""

    @wraps(method)
    def run(engine: Any) -> Result:
        with placed(engine):
            return method(engine)

    return run
