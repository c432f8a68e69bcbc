"""Threads: calls of one function side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Threads:
    """Runs one call where it is asked, and the others in threads that wait for further calls and end with this object."""

    def __init__(self) -> None:
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def each(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> None:
        """Call the function with each of these arguments. When all calls have ended, raises what one of them raised."""
        others = [self._executor().submit(function, *arguments) for arguments in calls[1:]]
        try:
            function(*calls[0])
        finally:
            raised = [call.exception() for call in others]
        for error in raised:
            if error is not None:
                raise error

    def _executor(self) -> ThreadPoolExecutor:
        """Made anew in a forked process, which has none of its parent's threads."""
        if self._pool is None or self._pool[0] != os.getpid():
            self._pool = os.getpid(), ThreadPoolExecutor(os.cpu_count(), "packed-backend")
        return self._pool[1]
