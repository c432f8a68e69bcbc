"""Threads: calls of one function side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Threads:
    """Runs one call where it is asked, and the others in threads that wait for further calls and end with this object."""

    def __init__(self) -> None:
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def each(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> None:
        """Call the function with each of these arguments. When all calls have ended, raises what one of them raised."""
        others: list[Future[Any]] = []
        try:
            for arguments in calls[1:]:
                others.append(self._executor().submit(function, *arguments))
            function(*calls[0])
        finally:
            raised = _exceptions(others)
        for error in raised:
            if error is not None:
                raise error

    def _executor(self) -> ThreadPoolExecutor:
        """Made anew in a forked process, which has none of its parent's threads."""
        if self._pool is None or self._pool[0] != os.getpid():
            self._pool = os.getpid(), ThreadPoolExecutor(os.cpu_count(), "packed-backend")
        return self._pool[1]


def _exceptions(calls: Sequence[Future[Any]]) -> list[BaseException | None]:
    """What each call raised, when all have ended. Ctrl-C waits for them too: they write into memory that later calls use."""
    try:
        return [call.exception() for call in calls]
    except BaseException:
        _exceptions(calls)
        raise
