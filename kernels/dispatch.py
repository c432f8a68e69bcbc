"""Which implementation an op takes, and whether a row may depend on its batch.

Invariants:
- By default tensors on an accelerator take the Triton kernels. Tensors on a CPU take the functions that numba compiles, if the
  op has them and numba is installed. All other tensors take the torch reference, and so does every call that needs a gradient.
- The choice is the caller's context, never an argument passed through the network: `with using(...)` around a step.
- Nothing here imports triton or numba.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal, ParamSpec, TypeVar, get_args

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Implementation = Literal["auto", "triton", "numba", "reference"]


@dataclass(frozen=True, slots=True)
class Choice:
    """Attributes:
    implementation: `auto` decides by device; `triton` on a CPU needs Triton's interpreter (TRITON_INTERPRET=1), `numba` is a
        CPU's.
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
    if implementation is not None and implementation not in get_args(Implementation):
        raise ValueError(f"implementation: {implementation!r} is unknown; use one of {', '.join(get_args(Implementation))}")
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
    return known[0].is_cuda


def takes_numba(*tensors: torch.Tensor) -> bool:
    """Whether an op on these tensors, of a CPU and at most float32, takes what numba compiled."""
    for tensor in tensors:  # small steps ask this several times: a generator takes as long as the answer
        if not tensor.is_cpu or tensor.dtype == torch.float64:
            return False
    implementation = _choice.get().implementation
    if implementation != "auto":
        return implementation == "numba"
    return _has_numba() and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


@cache
def _has_numba() -> bool:
    return find_spec("numba") is not None


@cache
def compiled_where_installed(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function of arrays and numbers as numba compiles it; itself where numba is not installed. The caller's module does not
    import numba before the first call."""
    if not _has_numba():
        return function
    from .compiled import compiled

    return compiled()(function)


def dispatched(
    reference: Callable[Arguments, Result], triton: str = "triton", numba: str | None = None, wide: bool = True
) -> Callable[Arguments, Result]:
    """The op of a reference: the same function in a faster module of its folder where its tensors take that one.

    Args:
        reference: of an op's `reference.py`. Its first argument is a tensor, or a named tuple that begins with one.
        triton, numba: the modules, imported at first use; None for none.
        wide: the Triton version takes float64.
    """
    folder, name = reference.__module__.rpartition(".")[0], reference.__name__

    @cache
    def loaded(module: str) -> ModuleType:
        return import_module(f"{folder}.{module}")

    @wraps(reference)
    def op(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        if numba is not None and takes_numba(_first(arguments)):
            return getattr(loaded(numba), name)(*arguments, **options)
        # Without gradients the first tensor decides.
        tensors = list(_tensors(arguments)) if torch.is_grad_enabled() else [_first(arguments)]
        if (wide or tensors[0].dtype != torch.float64) and takes_triton(*tensors):
            return getattr(loaded(triton), name)(*arguments, **options)
        return reference(*arguments, **options)

    return op


def _first(arguments: Sequence[Any]) -> torch.Tensor:
    """The first tensor of arguments that begin with one, or with a tuple that does."""
    first = arguments[0]
    while not isinstance(first, torch.Tensor):
        first = first[0]
    return first


def _tensors(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    for each in arguments:
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, tuple):
            yield from _tensors(each)
