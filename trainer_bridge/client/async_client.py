"""The asyncio twin of RolloutClient: the same calls with the same guarantees, as coroutines.

Each call runs in a thread of the client's own, on the same RolloutClient; there is no second implementation. A task that
is cancelled while it waits loses nothing: what it would have been handed is handed to the next call, or is delivered to
the next life of the client.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from ...errors import TransportError
from ...rollout.types import RolloutRequest, Trajectory
from ..wire.keys import ClientKeys
from .arguments import OnError, check_on_error, check_seconds
from .async_control import AsyncServiceControl
from .connection import RequestRefused
from .handed_out import CALLER
from .message_loop import Figures
from .pending_requests import Arrival
from .rollout_client import STOP, RolloutClient

MAX_WAITING, MAX_SHORT = 64, 8
"""Calls of `results` and `generate` that wait at once, and other calls; each takes a thread. Further ones wait for a place. So do
calls of `control` that wait for samples, in MAX_SHORT threads of their own."""
T = TypeVar("T")


class _Threads(ThreadPoolExecutor):
    """Threads of a client. After `shutdown` a call is refused in the package's words."""

    closed = False

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        if self.closed:
            raise TransportError("this client is closed; connect again with the same client_id")
        return super().submit(function, *arguments, **named)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.closed = True
        super().shutdown(wait, cancel_futures=cancel_futures)


class AsyncRolloutClient:
    """A RolloutClient for asyncio; made by `await AsyncRolloutClient.connect(...)`. An async context manager.

    With ack="auto" the trajectories that a task was handed are acknowledged at the task's next call.
    """

    def __init__(self, client: RolloutClient) -> None:
        self._client = client
        self._waiting = _Threads(MAX_WAITING, "blockroll-wait")
        self._short = _Threads(MAX_SHORT, "blockroll-call")
        self._controlling = _Threads(MAX_SHORT, "blockroll-control")

    @classmethod
    async def connect(cls, address: str, *, client_id: str | None = None, keys: ClientKeys | None = None,
                      timeout: float = 30.0, ack: Literal["auto", "manual"] = "auto") -> Self:
        """See `connect`."""
        return cls(await asyncio.to_thread(
            RolloutClient, address, client_id=client_id, keys=keys, timeout=timeout, ack=ack))

    @property
    def client_id(self) -> str:
        return self._client.client_id

    @property
    def delivery(self) -> dict[str, int]:
        """See RolloutClient.delivery."""
        return self._client.delivery

    @property
    def version(self) -> int:
        """See RolloutClient.version."""
        return self._client.version

    async def submit(self, requests: Iterable[RolloutRequest]) -> None:
        """See RolloutClient.submit."""
        await self._call(self._short, lambda: self._client.submit(requests))

    async def results(self, timeout: float | None = None, *, on_error: OnError = "raise") -> AsyncIterator[Trajectory]:
        """See RolloutClient.results."""
        check_seconds("timeout", timeout)
        check_on_error(on_error)
        while (found := await self._call(self._waiting, lambda: self._client.take(timeout, on_error), self._undo)) is not None:
            yield found[1]

    async def generate(self, requests: Iterable[RolloutRequest], timeout: float | None = None, *, on_error: OnError = "raise",
                       deadline_seconds: float | None = None) -> list[Trajectory]:
        """See RolloutClient.generate."""
        return await self._call(self._waiting, lambda: self._client.generate(
            requests, timeout, on_error=on_error, deadline_seconds=deadline_seconds), self._client.forget_handed)

    async def cancel(self, request_ids: Iterable[str]) -> None:
        """See RolloutClient.cancel."""
        await self._call(self._short, lambda: self._client.cancel(request_ids))

    async def acknowledge(self, done: Iterable[Trajectory | RequestRefused | RolloutRequest]) -> None:
        """See RolloutClient.acknowledge."""
        await self._call(self._short, lambda: self._client.acknowledge(done))

    async def push_weights(self, version: int, tensors: Mapping[str, Any], *, allow_gap: bool = False,
                           in_flight: str = "finish") -> int:
        """See RolloutClient.push_weights. A push goes on to its end when its task is cancelled."""
        return await self._call(self._short, lambda: self._client.push_weights(
            version, tensors, allow_gap=allow_gap, in_flight=in_flight))

    async def status(self) -> Figures:
        """See RolloutClient.status."""
        return await self._call(self._short, self._client.status)

    def control(self) -> AsyncServiceControl:
        """See RolloutClient.control."""
        return AsyncServiceControl(self._client.control, self._short, self._controlling)

    async def close(self, *, acknowledge: bool = True) -> None:
        """See RolloutClient.close."""
        await asyncio.to_thread(self._client.close, acknowledge=acknowledge)
        for threads in (self._waiting, self._short, self._controlling):
            threads.shutdown(wait=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        await self.close(acknowledge=error is None)

    def _undo(self, found: tuple[Arrival, Trajectory] | None) -> None:
        if found is not None:
            self._client.give_back(found[0])

    async def _call(self, pool: ThreadPoolExecutor, function: Callable[[], T],
                    undo: Callable[[T], None] | None = None) -> T:
        """Runs a call in a thread, on behalf of this task.

        `undo` takes the result of a call whose task was cancelled, in the call's thread: a task that is cancelled again while
        its call ends does not wait for it. A call with `undo` that has no thread yet is not made.
        """
        context, stop, caller = copy_context(), threading.Event(), asyncio.current_task()
        context.run(CALLER.set, caller)
        if undo is not None:
            context.run(STOP.set, stop)
        call = pool.submit(context.run, function)
        waiting = asyncio.wrap_future(call)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            # Reads the exception of a call nobody waits for, which asyncio would print.
            waiting.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            if undo is not None and not call.cancel():
                stop.set()
                self._client.wake()
                await _undone(call, undo, caller)
            raise


async def _undone(call: Future[T], undo: Callable[[T], None], caller: object) -> None:
    """Returns when the call has ended and its result is undone. The caller is kept until then: what it was handed is not yet
    acknowledged by calls of others (HandedOut)."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def end(call: Future[T], caller: object = caller) -> None:
        try:
            if call.exception() is None:
                undo(call.result())
        finally:
            with suppress(RuntimeError):  # the loop is closed, so nobody waits
                loop.call_soon_threadsafe(ended.set)

    call.add_done_callback(end)
    await ended.wait()
