"""Threads in which searches compute. One whose function does not return is left behind, and another takes its place.

Invariants:
- A step that calls functions of the operator's ends for its client within its seconds. Steps without them wait for none of these.
- Threads that were left behind are counted, and bounded: they may wait for ever. They end with the process.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from .dispatch import call_in
from .http_errors import HttpError

T = TypeVar("T")
MAX_STEPS, MAX_LEFT = 16, 16
"""Steps at once that call functions, and others; and threads that may be left behind. More steps than cores, since a function
may wait for others."""
STEP_S, LEAST_S, MOST_S = 60.0, 5.0, 600.0
"""Seconds of a step that calls functions; bounds of the seconds where the request has a budget of its own."""


class SearchThreads:
    """Used from one event loop."""

    def __init__(self) -> None:
        self._places, self._of_functions = asyncio.Semaphore(MAX_STEPS), asyncio.Semaphore(MAX_STEPS)
        self._left: dict[object, str] = {}

    async def run(self, step: Callable[[], T], functions: str = "", budget: float | None = None) -> T:
        """The result of a step.

        Args:
            functions: names of those that it may call.
            budget: the request's seconds; None for any number.

        Raises HttpError (504) where they do not return, HttpError (503) where too many calls have not returned before.
        """
        self._check(functions)
        places, loop = self._of_functions if functions else self._places, asyncio.get_running_loop()
        await places.acquire()
        try:
            self._check(functions)
        except HttpError:
            places.release()
            raise
        result: asyncio.Future[T] = loop.create_future()
        seconds = STEP_S if budget is None else min(max(budget, LEAST_S), MOST_S)
        key, timer = object(), None

        def late() -> None:
            self._left[key] = functions
            places.release()
            said = f"search: {functions} has not returned within {seconds:g} s"
            _settle(result, None, HttpError(504, said, "search", "timeout"))

        def ended(value: Any, error: Exception | None) -> None:
            if timer is not None:
                timer.cancel()
            if self._left.pop(key, None) is None:
                places.release()
            _settle(result, value, error)

        def work() -> None:
            value, error = None, None
            try:
                value = step()
            except BaseException as raised:  # for whoever waits; what is no Exception would end the event loop
                error = raised if isinstance(raised, Exception) else RuntimeError(repr(raised))
            call_in(loop, ended, value, error)

        if functions:
            timer = loop.call_later(seconds, late)
        try:
            threading.Thread(target=work, name="blockroll-http-search", daemon=True).start()
        except RuntimeError as error:  # the machine has no room for one
            ended(None, error)
        return await result

    def _check(self, functions: str) -> None:
        if functions and len(self._left) >= MAX_LEFT:
            raise HttpError(503, f"search: {len(self._left)} calls of {', '.join(sorted(set(self._left.values())))} have not "
                            f"returned, so {functions} is not called; try again later", "search", "unavailable")


def _settle(result: asyncio.Future[Any], value: Any, error: Exception | None) -> None:
    """Nobody may wait any more."""
    if not result.done():
        result.set_result(value) if error is None else result.set_exception(error)
