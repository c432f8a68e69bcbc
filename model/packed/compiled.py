"""Functions compiled by numba at their first call, and kept on disk for the next process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(fastmath: frozenset[str] = frozenset()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function of arrays and numbers.

    Args:
        fastmath: LLVM's names of what may be done with floats beside what is written.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        options: dict[str, Any] = {"error_model": "numpy", "fastmath": set(fastmath)}
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # nowhere to keep it: neither beside the source nor in the user's cache
            return njit(**options)(function)

    return decorate
