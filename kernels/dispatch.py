"""Which implementation an op takes, and whether a row may depend on its batch.

Invariants:
- By default accelerator tensors take the Triton kernels and everything else the torch reference; where a gradient will be
  asked for, the reference, which has one.
- The choice is the caller's context, never an argument passed through the network: `with using(...)` around a step.
- Nothing here imports triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Literal

import torch

Implementation = Literal["auto", "triton", "reference"]


@dataclass(frozen=True, slots=True)
class Choice:
    """Attributes:
    implementation: `auto` decides by device; `triton` on a CPU needs Triton's interpreter (TRITON_INTERPRET=1).
    batch_invariant: tile shapes and reduction orders fixed, so that a row's result does not depend on its batch.
    """

    implementation: Implementation = "auto"
    batch_invariant: bool = False


_DEFAULT = Choice()
_choice: ContextVar[Choice] = ContextVar("choice", default=_DEFAULT)


@contextmanager
def using(implementation: Implementation | None = None, batch_invariant: bool | None = None) -> Iterator[Choice]:
    """Within it, ops take this implementation; None leaves a part as it was. Nests; each thread has its own.

    Raises: ValueError for an unknown implementation.
    """
    if implementation not in (None, "auto", "triton", "reference"):
        raise ValueError(f"implementation: {implementation!r} is unknown; use auto, triton or reference")
    choice = _choice.get()
    if implementation is not None:
        choice = replace(choice, implementation=implementation)
    if batch_invariant is not None:
        choice = replace(choice, batch_invariant=batch_invariant)
    token = _choice.set(choice)
    try:
        yield choice
    finally:
        _choice.reset(token)


def batch_invariant() -> bool:
    """Whether tile shapes must not depend on the number of rows."""
    return _choice.get().batch_invariant


def takes_triton(*tensors: torch.Tensor | None) -> bool:
    """Whether an op on these tensors takes its Triton kernel."""
    implementation = _choice.get().implementation
    if implementation != "auto":
        return implementation == "triton"
    known = [tensor for tensor in tensors if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in known):
        return False
    return known[0].device.type == "cuda"
