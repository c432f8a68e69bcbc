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


def _work(calls: SimpleQueue[Any], begun_1: np.ndarray) -> None:
    """Run calls until one is None."""
    while (call := calls.get()) is not None:
        result, function, arguments = call
        error: BaseException | None = None
        try:
            function(*arguments)
        except BaseException as raised:  # it is raised where the call was given
            error = raised
        result.put(error)
        del call, result, function, arguments, error
        _look(begun_1, int(begun_1[0]), _PATIENCE)


class Threads:
    """Runs one call where it is asked, and the others in threads that wait for further calls and end with this object."""

    def __init__(self) -> None:
        self._begun_1, self._nothing_1 = _count(), _count()
        self._process, self._workers = os.getpid(), list[SimpleQueue[Any]]()

    def each(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> None:
        """Call the function with each of these arguments. When all calls have ended, raises what one of them raised.

        Args:
            function: without the interpreter's lock, first tells its first argument, last its second (`tell`).
        """
        if self._process != os.getpid():  # a forked process has none of its parent's threads
            self._process, self._workers = os.getpid(), []
        while len(self._workers) < len(calls) - 1:
            queue = SimpleQueue[Any]()
            Thread(target=_work, args=(queue, self._begun_1), name="packed-backend", daemon=True).start()
            self._workers.append(queue)
        given = [(SimpleQueue[Any](), _count(), arguments) for arguments in calls[1:]]
        try:
            for worker, (result, ended_1, arguments) in zip(self._workers, given, strict=False):
                worker.put((result, function, (self._nothing_1, ended_1, *arguments)))
            function(self._begun_1, self._nothing_1, *calls[0])
            raised = []
            for result, ended_1, _ in given:
                _look(ended_1, 0, _PATIENCE)
                raised.append(result.get())
        except BaseException:
            self._settle()
            raise
        for error in raised:
            if error is not None:
                raise error

    def _settle(self) -> None:
        """Wait until no call runs, also after Ctrl-C: calls write into memory that later ones use. Each thread runs its calls in
        their order, so they have ended when a call behind them has."""
        for worker in self._workers:
            settled = False
            while not settled:
                try:
                    result = SimpleQueue[Any]()
                    worker.put((result, int, ()))
                    settled = result.get() is None
                except KeyboardInterrupt:
                    pass  # the first one is raised

    def __del__(self) -> None:
        for worker in self._workers:
            worker.put(None)
