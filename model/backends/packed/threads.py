"""Threads: parts of one call of a compiled function side by side.

A pass takes less than a millisecond, and the next one follows soon. Waking a thread and giving it the interpreter's lock takes a
tenth of that. So parts are handed over without the interpreter. The caller writes down where the call lies. A thread that has
ended its part keeps looking for the next one for a while, and the caller looks in the same way for the end. A part that no thread
has begun by the time the caller has ended its own is run by the caller.

The desk: int64, a line of the processor's cache for each thread. Line 0 holds the addresses of the function and of its arguments;
line n holds the state of thread n, and whether its part has failed.
"""

from __future__ import annotations

import os
import platform
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ....kernels.compiled import compiled

_LINE = 8
"""Numbers in a line of the processor's cache."""
_LOOKS, _GIVEN, _RUNS, _ENDED, _SLEEPS = range(5)
"""States of a thread. The caller makes LOOKS GIVEN, ENDED LOOKS, GIVEN LOOKS where it takes a part back, and, before it wakes the
thread, SLEEPS LOOKS; the thread makes GIVEN RUNS, RUNS ENDED, and LOOKS SLEEPS."""
_PATIENCE = 2**16
"""Looks before a thread sleeps: a millisecond or more, longer than the host takes between two passes."""
MOST = 1024
"""Threads of a call."""
_LONG, _BYTES = ir.IntType(64), ir.IntType(8).as_pointer()
_PART = ir.FunctionType(_LONG, [_BYTES, _LONG])


def _entry(context: Any, builder: Any, array: Any, value: Any, at: Any) -> Any:
    return builder.gep(context.make_array(array)(context, builder, value).data, [at])


def _call(builder: Any, returns: Any, name: str) -> None:
    builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(returns, []), name), [])


@intrinsic
def _state(typing_context, desk, at):
    """desk[at] as another thread may have changed it; what was written before that is seen here."""

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(_entry(context, builder, desk, *arguments), "acquire", 8)

    return types.int64(desk, types.intp), generate


@intrinsic
def _pause(typing_context):
    """A moment that leaves the core to what else runs on it."""

    def generate(context, builder, signature, arguments):
        if platform.machine() in ("x86_64", "AMD64"):
            _call(builder, ir.VoidType(), "llvm.x86.sse2.pause")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _give_way(typing_context):
    """Lets another thread run on this core."""

    def generate(context, builder, signature, arguments):
        if hasattr(os, "sched_yield"):
            _call(builder, ir.IntType(32), "sched_yield")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _exchange(typing_context, desk, at, state):
    """Writes desk[at], and what was written before, for other threads. Returns what stood there."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("xchg", _entry(context, builder, desk, *arguments[:2]), arguments[2], "acq_rel")

    return types.int64(desk, types.intp, types.int64), generate


@intrinsic
def _changed(typing_context, desk, at, before, state):
    """`_exchange` where desk[at] is `before`. Returns whether it was."""

    def generate(context, builder, signature, arguments):
        entry = _entry(context, builder, desk, *arguments[:2])
        return builder.extract_value(builder.cmpxchg(entry, *arguments[2:], "acq_rel", "acquire"), 1)

    return types.boolean(desk, types.intp, types.int64, types.int64), generate


@intrinsic
def hand_over(typing_context, function, arguments, desk):
    """Writes down a call for `in_threads`: part n is function(n, *arguments). It is valid until the function that is compiled
    around this returns."""
    whole = function.get_call_type(typing_context, (types.intp, *arguments.types), {})

    def generate(context, builder, signature, values):
        compiled_function, packed = function.dispatcher.get_compile_result(whole), values[1]
        context.active_code_library.add_linking_library(compiled_function.library)
        kept = cgutils.alloca_once_value(builder, packed)
        part = ir.Function(builder.module, _PART, builder.module.get_unique_name("part"))
        part.linkage = "internal"
        inner = ir.IRBuilder(part.append_basic_block())
        unpacked = cgutils.unpack_tuple(inner, inner.load(inner.bitcast(part.args[0], packed.type.as_pointer())))
        described = compiled_function.fndesc
        status, _ = context.call_conv.call_function(
            inner, context.declare_function(builder.module, described), described.restype, described.argtypes,
            [part.args[1], *unpacked],
        )  # fmt: skip
        inner.ret(inner.zext(status.is_error, _LONG))
        for at, address in enumerate((part, kept)):
            builder.store(builder.ptrtoint(address, _LONG), _entry(context, builder, desk, values[2], _LONG(at)))
        return context.get_dummy_value()

    return types.void(function, arguments, desk), generate


@intrinsic
def _run(typing_context, desk, number):
    """Runs a part of the call on the desk. Returns 1 where it raises, 0 where it does not."""

    def generate(context, builder, signature, arguments):
        part, kept = (builder.load(_entry(context, builder, desk, arguments[0], _LONG(at))) for at in (0, 1))
        function = builder.inttoptr(part, _PART.as_pointer())
        return builder.call(function, [builder.inttoptr(kept, _BYTES), arguments[1]])

    return types.int64(desk, types.intp), generate


@compiled()
def in_threads(desk, count):
    """Runs the parts of the call on the desk, the first one here and the others in threads. Returns how many raised.

    Args:
        desk: of `Threads.desk` for as many parts.
    """
    for n in range(1, count):
        if _exchange(desk, n * _LINE, _GIVEN) == _SLEEPS:
            _exchange(desk, n * _LINE, _SLEEPS)
    raised = _run(desk, 0)
    for n in range(1, count):
        at = n * _LINE
        if _changed(desk, at, _GIVEN, _LOOKS) or _state(desk, at) == _SLEEPS:
            raised += _run(desk, n)
            continue
        looks = 0
        while _state(desk, at) != _ENDED:
            looks += 1
            if looks < _PATIENCE:
                _pause()
            else:
                _give_way()
        raised += desk[at + 1]
        _exchange(desk, at, _LOOKS)
    return raised


@compiled(nogil=True)
def _serve(desk, number, patience):
    """Runs parts as they are given, until none came for a while."""
    at, left = number * _LINE, patience
    while True:
        if _state(desk, at) == _GIVEN and _changed(desk, at, _GIVEN, _RUNS):
            desk[at + 1] = _run(desk, number)
            _exchange(desk, at, _ENDED)
            left = patience
        _pause()
        left -= 1
        if left <= 0 and _changed(desk, at, _LOOKS, _SLEEPS):
            return


def _work(desk: np.ndarray, number: int, wake: SimpleQueue[bool]) -> None:
    """Serve, and sleep, until woken with False."""
    awake = True
    while awake:
        _serve(desk, number, _PATIENCE)
        awake = wake.get()


class Threads:
    """The threads that run parts beside the caller's own. They end with this object. One call at a time."""

    def __init__(self) -> None:
        self._process, self._desk, self._wake = os.getpid(), _desk(), list[SimpleQueue[bool]]()

    def desk(self, parts: int) -> np.ndarray:
        """Where a call of so many parts, at most `MOST`, is handed over. The threads look for it now."""
        if self._process != os.getpid():  # a forked process has none of its parent's threads
            self._process, self._desk, self._wake = os.getpid(), _desk(), []
        for number in range(1, parts):
            if number > len(self._wake):
                _serve(_desk(), number, 0)  # compiled here, and not while a part waits
                wake = SimpleQueue[bool]()
                Thread(target=_work, args=(self._desk, number, wake), name="packed-backend", daemon=True).start()
                self._wake.append(wake)
            elif self._desk[number * _LINE] == _SLEEPS:
                self._desk[number * _LINE] = _LOOKS
                self._wake[number - 1].put(True)
        return self._desk

    def __del__(self) -> None:
        for wake in self._wake:
            wake.put(False)


def _desk() -> np.ndarray:
    """Its lines begin where those of the processor's cache do."""
    memory = np.zeros((MOST + 1) * _LINE, np.int64)
    first = -(memory.ctypes.data // memory.itemsize) % _LINE
    return memory[first : first + MOST * _LINE]
