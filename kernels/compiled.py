"""Functions that numba compiles at their first call and keeps on disk for the next process.

Invariants:
- Only `wide_total` and `stretch_total` sum in any order. They read and do not write, so their length alone decides how they are
  vectorised. All other functions compute as written, except for what `FUSED` allows, and give the same numbers vectorised or
  not.
- After an edit of a file, every function that calls a compiled one of it is compiled again. numba itself looks at the
  function's own file alone. A function stands below those that it calls: others are not known yet when it is decorated.
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
STRETCH = 32
"""Numbers of a `stretch_total`."""


def compiled(
    fastmath: frozenset[str] = frozenset(), nogil: bool = False, inlined: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function of arrays and numbers.

    Args:
        fastmath: LLVM's flags for the transformations of float arithmetic that are allowed.
        nogil: other threads of the interpreter run while the function does.
        inlined: LLVM puts the function's code in the place of every call of it. A call that passes arrays takes 10 ns.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        options = {"error_model": "numpy", "fastmath": set(fastmath), "nogil": nogil, "forceinline": inlined}
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


@compiled(_ANY_ORDER)
def wide_total(x, count):
    """Sum of the first `count` of x, in float64."""
    s = 0.0
    for i in range(count):
        s += np.float64(x[i])
    return s


@compiled(_ANY_ORDER, inlined=True)
def stretch_total(x, begin):
    """Sum of the STRETCH numbers of x from `begin` on, in float64: a few vector operations, because the length is known."""
    s = 0.0
    for i in range(STRETCH):
        s += np.float64(x[begin + i])
    return s


@compiled()
def _ordered(bits):
    """An int32 in the order of the float32 that has these bits, or back: LLVM vectorises comparisons of integers."""
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@compiled()
def largest(x, count):
    """Largest of the first `count` of float32 x; -inf if `count` is 0; any number if one of them is NaN."""
    bits, top = x.view(np.int32), np.int32(_LEAST)
    for i in range(count):
        b = _ordered(bits[i])
        top = b if b > top else top
    return np.int32(_ordered(top)).view(np.float32)


@compiled(inlined=True)
def divide(x, by, quotient):
    """quotient = x / by, float32, and the `largest` of it."""
    top = np.int32(_LEAST)
    for i in range(quotient.shape[0]):
        quotient[i] = x[i] / by
        b = _ordered(_F(x[i] / by).view(np.int32))
        top = b if b > top else top
    return np.int32(_ordered(top)).view(np.float32)


@compiled(FUSED)
def exponential(x):
    """exp of a float32 to two units in the last place (the polynomial of Cephes' expf). Values below -87 count as -87."""
    y = x if x > _F(-87.0) else _F(-87.0)
    n = np.floor(y * _F(1.44269504) + _F(0.5))
    r = y - n * _F(0.693359375) + n * _F(2.12194440e-4)
    p = _F(1.9875691500e-4) * r + _F(1.3981999507e-3)
    p = p * r + _F(8.3334519073e-3)
    p = p * r + _F(4.1665795894e-2)
    p = p * r + _F(1.6666665459e-1)
    p = p * r + _F(5.0000001201e-1)
    return np.int32(_F(p * r * r + r + _F(1.0)).view(np.int32) + (np.int32(n) << np.int32(23))).view(np.float32)
