"""Threads: calls of one compiled function side by side.

A pass takes less than a millisecond, and the next one follows soon. Waking a thread and giving it the interpreter's lock takes a
tenth of that. So a thread that has ended its call keeps looking for the next one for a while, without the lock, and begins when
the caller has given the lock up; the caller looks in the same way for the end.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ....kernels.compiled import compiled

_PATIENCE = 2**21
"""Looks before a thread sleeps: about a millisecond."""


@intrinsic
def _told(typing_context, count_1):
    """count_1[0], int64, as another thread may have changed it."""

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(context.make_array(count_1)(context, builder, arguments[0]).data, "acquire", 8)

    return types.int64(count_1), generate


@intrinsic
def tell(typing_context, count_1):
    """Adds one to count_1[0], int64, for a thread that looks at it; what was written before is seen there."""

    def generate(context, builder, signature, arguments):
        count = context.make_array(count_1)(context, builder, arguments[0]).data
        builder.atomic_rmw("add", count, ir.Constant(ir.IntType(64), 1), "release")
        return context.get_dummy_value()

    return types.void(count_1), generate


@compiled(nogil=True)
def _look(count_1, seen, patience):
    """Until the count is not `seen` any more, or patience ends."""
    for _ in range(patience):
        if _told(count_1) != seen:
            return


def _count() -> np.ndarray:
    """int64[1], alone in its line of the processor's cache."""
    return np.zeros(16, np.int64)[8:9]


class _Worker:
    """A thread. It ends when it is given None.

    Args:
        begun_1: counts the calls of the thread that gives.
    """

    def __init__(self, begun_1: np.ndarray) -> None:
        self._calls, self._results = SimpleQueue[Any](), SimpleQueue[BaseException | None]()
        self._ended_1, self._before = _count(), 0
        Thread(target=_work, args=(self._calls, self._results, begun_1), name="packed-backend", daemon=True).start()

    def give(self, function: Callable[..., Any] | None, arguments: tuple[Any, ...] = ()) -> None:
        """A call. What it raised must be taken before the next one."""
        self._before = int(self._ended_1[0])
        self._calls.put(None if function is None else (function, (_count(), self._ended_1, *arguments)))

    def raised(self) -> BaseException | None:
        """What the call raised, when it has ended."""
        _look(self._ended_1, self._before, _PATIENCE)
        return self._results.get()


def _work(calls: SimpleQueue[Any], results: SimpleQueue[BaseException | None], begun_1: np.ndarray) -> None:
    while (call := calls.get()) is not None:
        error: BaseException | None = None
        try:
            call[0](*call[1])
        except BaseException as raised:  # it is raised where the call was given
            error = raised
        results.put(error)
        del call, error
        _look(begun_1, int(begun_1[0]), _PATIENCE)


class Threads:
    """Runs one call where it is asked, and the others in threads that wait for further calls and end with this object."""

    def __init__(self) -> None:
        self._begun_1, self._nothing_1 = _count(), _count()
        self._process, self._workers = os.getpid(), list[_Worker]()

    def each(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> None:
        """Call the function with each of these arguments. When all calls have ended, raises what one of them raised.

        Args:
            function: without the interpreter's lock, first tells its first argument, last its second (`tell`).
        """
        if self._process != os.getpid():  # a forked process has none of its parent's threads
            self._process, self._workers = os.getpid(), []
        while len(self._workers) < len(calls) - 1:
            self._workers.append(_Worker(self._begun_1))
        busy: list[_Worker] = []
        try:
            for worker, arguments in zip(self._workers, calls[1:], strict=False):
                worker.give(function, arguments)
                busy.append(worker)
            function(self._begun_1, self._nothing_1, *calls[0])
        finally:
            raised = _raised(busy)
        for error in raised:
            if error is not None:
                raise error

    def __del__(self) -> None:
        for worker in self._workers:
            worker.give(None)


def _raised(busy: list[_Worker]) -> list[BaseException | None]:
    """What each call raised, when all have ended. Ctrl-C waits for them too: they write into memory that later calls use."""
    found = []
    while busy:
        try:
            found.append(busy[0].raised())
            del busy[0]
        except BaseException:
            _raised(busy)
            raise
    return found
