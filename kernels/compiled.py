"""Functions that numba compiles at their first call and keeps on disk for the next process.

Invariants:
- Only `total`, `wide_total` and `squares` sum in any order. They read and do not write, so their length alone decides how they
  are vectorised. All other functions compute as written, except for what `FUSED` allows, and give the same numbers vectorised
  or not.
- After an edit of a file, every function that calls a compiled one of it is compiled again. numba itself looks at the
  function's own file alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import numpy as np
from numba import njit

_F = np.float32
_ANY_ORDER = frozenset({"reassoc", "contract", "nsz"})
_LEAST = int(np.float32(-np.inf).view(np.int32)) ^ 0x7FFFFFFF
FUSED = frozenset({"contract"})
"""For `compiled`: LLVM may fuse a product and a sum into one multiply-add. The numbers are the same on every processor only if
the source allows one way to fuse, and if its loops end at a multiple of the vector length or always at the same place."""


def compiled(fastmath: frozenset[str] = frozenset(), nogil: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function of arrays and numbers.

    Args:
        fastmath: LLVM's flags for the transformations of float arithmetic that are allowed.
        nogil: other threads of the interpreter run while the function does.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        options: dict[str, Any] = {"error_model": "numpy", "fastmath": set(fastmath), "nogil": nogil}
        try:
            dispatcher = njit(cache=True, **options)(function)
        except RuntimeError:  # no writable cache, neither beside the source nor in the user's directory
            return njit(**options)(function)
        kept = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
        if kept is not None:
            kept._source_stamp = kept._source_stamp, _stamp(function)
        return dispatcher

    return decorate


def _stamp(function: Callable[..., Any]) -> tuple[tuple[float, int], ...]:
    """When the files of the function and of those that it calls were changed, and their sizes."""
    return tuple((stat.st_mtime, stat.st_size) for stat in map(os.stat, filter(os.path.exists, sorted(_files(function)))))


def _files(function: Callable[..., Any]) -> set[str]:
    """The file of a function, those of the compiled functions and intrinsics that it calls, and those of this package's functions
    and classes that write the code of intrinsics."""
    found: set[str] = set()
    waiting, seen, own = [function], {function}, __name__.partition(".")[0]
    while waiting:
        function = waiting.pop()
        found.add(function.__code__.co_filename)
        for name in _names(function.__code__):
            value = function.__globals__.get(name)
            called = getattr(value, "py_func", None) or getattr(value, "_defn", None)
            if called is None and getattr(value, "__module__", None) and value.__module__.partition(".")[0] == own:
                if isinstance(value, type):
                    found.add(str(sys.modules[value.__module__].__file__))
                called = value if isinstance(value, FunctionType) else None
            if called is not None and called not in seen:
                seen.add(called)
                waiting.append(called)
    return found


def _names(code: CodeType) -> set[str]:
    """The global names in a function's code and in that of the functions within it."""
    return set(code.co_names).union(*(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


@compiled()
def copy(source, target):
    """Copy all of `source` to the beginning of `target`. numba compiles `target[:] = source` to a loop over single numbers; this
    loop is vectorised."""
    for i in range(source.shape[0]):
        target[i] = source[i]


@compiled(_ANY_ORDER)
def total(x, count):
    """Sum of the first `count` of x, in x's type."""
    s = _F(0)
    for i in range(count):
        s += x[i]
    return s


@compiled(_ANY_ORDER)
def wide_total(x, count):
    """Sum of the first `count` of x, in float64."""
    s = 0.0
    for i in range(count):
        s += np.float64(x[i])
    return s


@compiled(_ANY_ORDER)
def squares(x):
    """Sum of the squares of x."""
    s = _F(0)
    for i in range(x.shape[0]):
        s += x[i] * x[i]
    return s


@compiled()
def largest(x, count):
    """Largest of the first `count` of float32 x; -inf if `count` is 0; any number if one of them is NaN. The loop compares
    integers of the same order, because LLVM vectorises that comparison."""
    bits, top = x.view(np.int32), np.int32(_LEAST)
    for i in range(count):
        b = bits[i]
        b = np.int32(b ^ ((b >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        top = b if b > top else top
    return np.int32(top ^ ((top >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


@compiled(FUSED)
def exponentials(x, count):
    """exp of the first `count` of float32 x, in place, to two units in the last place (the polynomial of Cephes' expf). Values
    below -87 count as -87."""
    bits = x.view(np.int32)
    for i in range(count):
        y = x[i] if x[i] > _F(-87.0) else _F(-87.0)
        n = np.floor(y * _F(1.44269504) + _F(0.5))
        r = y - n * _F(0.693359375) + n * _F(2.12194440e-4)
        p = _F(1.9875691500e-4) * r + _F(1.3981999507e-3)
        p = p * r + _F(8.3334519073e-3)
        p = p * r + _F(4.1665795894e-2)
        p = p * r + _F(1.6666665459e-1)
        p = p * r + _F(5.0000001201e-1)
        bits[i] = _F(p * r * r + r + _F(1.0)).view(np.int32) + (np.int32(n) << np.int32(23))
