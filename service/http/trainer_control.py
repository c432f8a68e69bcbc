"""What trainers change over HTTP: pauses, aborted requests, weight versions. Each call is one of a control session.

Invariants:
- One weight update at a time. Another one is refused with 409 while it lasts, and changes nothing.
- A version comes from a directory that the service can read, or from chunks. Chunks are kept in this process until the last one
  is there; they take at most the memory of one policy.
- The event loop never waits for the gateway.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from ...errors import TransportError
from ...trainer_bridge.client import ServiceControl
from ...trainer_bridge.gateway import Gateway
from ...trainer_bridge.wire.keys import ClientKeys
from ...trainer_bridge.wire.messages import PauseMode
from .dispatch import Dispatch
from .http_errors import HttpError
from .weight_chunks import Tensor, WeightChunks

T = TypeVar("T")
MAX_CALLS = 16
"""Pauses and aborts at once, which wait for samples, and other calls at once. Each takes a thread."""
_LOOK_S = 0.05
IDLE_S = 300.0
"""Seconds without a chunk after which another update may replace one that was started."""


class TrainerControl:
    """Control of one service. Used from the event loop.

    Args:
        keys: of the gateway.
        dispatch: refuses new requests while a pause says so.
    """

    def __init__(self, gateway: Gateway, keys: ClientKeys | None, dispatch: Dispatch) -> None:
        self._address, self._keys, self._gateway = gateway.address, keys, gateway
        self._calls = ThreadPoolExecutor(MAX_CALLS, "blockroll-http-control")
        self._waits = ThreadPoolExecutor(MAX_CALLS, "blockroll-http-wait")  # of their own, so that a resume finds a thread
        self._closed, self._waiting = False, 0
        self._pauses = set[asyncio.Future[None]]()  # that have not begun
        self._updating = threading.Lock()
        self._chunks: WeightChunks | None = None
        self._touched = 0.0
        self._in_flight, self._refuses = "keep", False
        dispatch.refuses = lambda: self._refuses and bool(self.paused)

    @property
    def paused(self) -> str:
        """Mode of the pause; empty while there is none."""
        return self._gateway.paused

    async def pause(self, mode: PauseMode, *, reset_cache: bool, refuse: bool, in_flight: str = "keep") -> None:
        """Pauses; returns when no engine makes a step.

        Args:
            refuse: answer new requests with 503 until the pause is over; otherwise they wait.
            in_flight: what a weight update does to held samples, where it does not say so itself.
        """
        self._check_waiting()
        self._refuses, self._in_flight = refuse, in_flight
        pause = asyncio.ensure_future(self._wait(lambda control: control.pause(mode, reset_cache=reset_cache)))
        self._pauses.add(pause)
        pause.add_done_callback(self._pauses.discard)
        await pause

    async def resume(self) -> None:
        """Ends the pause, and those that were asked for and have not begun."""
        self._refuses, self._in_flight = False, "keep"
        asked = set(self._pauses)
        await self._call(lambda control: control.resume())
        while asked:  # one of them may reach the gateway behind the resume
            ended, asked = await asyncio.wait(asked, timeout=_LOOK_S)
            if asked or any(not pause.cancelled() and pause.exception() is None for pause in ended):
                await self._call(lambda control: control.resume())

    async def abort(self, request_ids: Sequence[str] | None) -> None:
        """Ends requests where they are; None for all. Their clients are answered with what they have."""
        self._check_waiting()
        await self._wait(lambda control: control.abort(request_ids))

    async def reset_prefix_cache(self) -> None:
        """Has the engines forget K/V that they keep for other requests."""
        await self._call(lambda control: control.reset_prefix_cache())

    async def label(self, version: int) -> int:
        """Gives the weights that serve another version number; returns it."""
        return await self._update(lambda control: control.label_version(version))

    async def load(self, directory: str, version: int | None, in_flight: str | None) -> int:
        """Makes the weights of a directory those that serve; returns their version: `version`, or the next one."""
        policy = in_flight or self._in_flight
        return await self._update(lambda control: control.load_weights(
            _next(control, version), directory, allow_gap=True, in_flight=policy))

    async def start_chunks(self) -> None:
        """Begins an update of which the tensors follow in chunks."""
        expected = await self._call(lambda control: control.expected_weights())
        # Nothing is awaited from here on, so of two that start at once one is refused.
        if self._chunks is not None and time.monotonic() - self._touched < IDLE_S:
            raise _busy()
        self._chunks, self._touched = WeightChunks(expected), time.monotonic()

    def add_chunk(self, tensors: Sequence[Tensor]) -> None:
        """Takes parts of tensors. An error leaves what came before."""
        self._begun().add(tensors)
        self._touched = time.monotonic()

    async def finish_chunks(self, version: int | None, in_flight: str | None) -> int:
        """Makes the tensors that came those that serve; returns their version. The update is over, however this ends."""
        chunks, self._chunks = self._begun(), None
        tensors = chunks.finish()
        policy = in_flight or self._in_flight
        return await self._update(lambda control: control.push_weights(
            _next(control, version), tensors, allow_gap=True, in_flight=policy))

    def close(self) -> None:
        """Frees the threads after their calls."""
        self._closed = True
        for threads in (self._calls, self._waits):
            threads.shutdown(wait=False, cancel_futures=True)

    def _begun(self) -> WeightChunks:
        if self._chunks is None:
            raise HttpError(409, "no weight update is started; call /start_weight_update first", code="no_weight_update")
        return self._chunks

    async def _update(self, act: Callable[[ServiceControl], int]) -> int:
        """One weight update. What the gateway refuses of it is answered with 409."""
        if not self._updating.acquire(blocking=False):
            raise _busy()
        # A call that is cancelled goes on in its thread, or is never made: the update is over when the thread says so.
        try:
            call = self._started(self._calls, act)
        except BaseException:
            self._updating.release()
            raise
        call.add_done_callback(lambda ended: self._updating.release())
        try:
            return await self._ended(call)
        except TransportError as error:
            raise HttpError(409, str(error), code="weights_refused") from error

    def _check_waiting(self) -> None:
        """Raises HttpError where so many calls wait that another one would begin only after some of them, perhaps behind a
        resume."""
        if self._waiting >= MAX_CALLS:
            raise HttpError(429, f"{MAX_CALLS} calls wait already for samples to end; wait for them, or call /resume",
                            code="rate_limit_exceeded")

    async def _wait(self, act: Callable[[ServiceControl], None]) -> None:
        self._waiting += 1
        try:
            await self._call(act, self._waits)
        finally:
            self._waiting -= 1

    async def _call(self, act: Callable[[ServiceControl], T], threads: ThreadPoolExecutor | None = None) -> T:
        return await self._ended(self._started(threads or self._calls, act))

    async def _ended(self, call: Future[T]) -> T:
        """The result of a call. Raises HttpError where the service stops before the call has found a thread."""
        try:
            return await asyncio.wrap_future(call)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and call.cancelled() and task is not None and not task.cancelling():
                raise _stops() from None
            raise

    def _started(self, threads: ThreadPoolExecutor, act: Callable[[ServiceControl], T]) -> Future[T]:
        try:
            return threads.submit(self._with_session, act)
        except RuntimeError as error:
            if not self._closed:
                raise
            raise _stops() from error

    def _with_session(self, act: Callable[[ServiceControl], T]) -> T:
        with ServiceControl(self._address, keys=self._keys) as control:
            return act(control)


def _next(control: ServiceControl, version: int | None) -> int:
    return int(control.status().figures["version"]) + 1 if version is None else version


def _stops() -> HttpError:
    return HttpError(503, "the service stops", code="unavailable")


def _busy() -> HttpError:
    return HttpError(409, "another weight update is under way; start this one when that has ended",
                     code="weight_update_in_progress")
