"""The asyncio twin of ServiceControl: the same calls as coroutines.

Each call is a session of its own in a thread, so calls may overlap: a resume while a pause waits. A call whose task is cancelled
goes on to its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, TypeVar

from ..wire import messages
from .service_control import ServiceControl, ServiceStatus

T = TypeVar("T")


class AsyncServiceControl:
    """What a trainer asks of a service beside rollouts; made by `AsyncRolloutClient.control`.

    Args:
        session: opens a session. threads, waiting: run the calls, and those that wait for samples; of the client, which has to be
            open. A call of `threads` finds one even while every thread of `waiting` waits for a resume.
    """

    def __init__(self, session: Callable[[], ServiceControl], threads: Executor, waiting: Executor) -> None:
        self._session, self._threads, self._waiting = session, threads, waiting

    async def status(self) -> ServiceStatus:
        """See ServiceControl.status."""
        return await self._call(lambda control: control.status())

    async def scale(self, engines: int, timeout: float = 60.0) -> None:
        """See ServiceControl.scale."""
        await self._call(lambda control: control.scale(engines, timeout))

    async def pause(self, mode: messages.PauseMode = "keep", *, reset_cache: bool = False, timeout: float | None = None) -> None:
        """See ServiceControl.pause."""
        await self._call(lambda control: control.pause(mode, reset_cache=reset_cache, timeout=timeout), self._waiting)

    async def resume(self) -> None:
        """See ServiceControl.resume."""
        await self._call(lambda control: control.resume())

    async def paused(self) -> str:
        """See ServiceControl.paused."""
        return await self._call(lambda control: control.paused())

    async def abort(self, request_ids: Iterable[str] | None = None) -> None:
        """See ServiceControl.abort."""
        await self._call(lambda control: control.abort(request_ids), self._waiting)

    async def reset_prefix_cache(self) -> None:
        """See ServiceControl.reset_prefix_cache."""
        await self._call(lambda control: control.reset_prefix_cache())

    async def push_weights(
        self, version: int, tensors: Mapping[str, Any], *, allow_gap: bool = False, in_flight: str = "finish"
    ) -> int:
        """See RolloutClient.push_weights."""
        return await self._call(lambda control: control.push_weights(
            version, tensors, allow_gap=allow_gap, in_flight=in_flight), self._waiting)

    async def load_weights(
        self, version: int, directory: str | Path, *, allow_gap: bool = False, in_flight: str = "finish"
    ) -> int:
        """See ServiceControl.load_weights."""
        return await self._call(lambda control: control.load_weights(
            version, directory, allow_gap=allow_gap, in_flight=in_flight), self._waiting)

    async def label_version(self, version: int) -> int:
        """See ServiceControl.label_version."""
        return await self._call(lambda control: control.label_version(version))

    async def _call(self, act: Callable[[ServiceControl], T], threads: Executor | None = None) -> T:
        def run() -> T:
            with self._session() as control:
                return act(control)

        return await asyncio.get_running_loop().run_in_executor(threads or self._threads, run)
