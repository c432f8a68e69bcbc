"""Requests of one server that wait for the service, each as a coroutine.

Invariants:
- Requests that arrive while a batch is being submitted are the next batch.
- A request whose coroutine is cancelled, once or several times, or has failed here, is cancelled at the service.
- When the gateway has been gone for `patience` to twice `patience` seconds, every call that waits fails, and so do those that
  come until it answers again.
- While the gate is closed no request is submitted; those that arrive wait for it, or are turned away.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from ....errors import BlockrollError, RequestError, TransportError
from ....rollout.types import RolloutRequest, Trajectory
from ...client import RequestRefused, ServiceControl
from ...client.async_client import AsyncRolloutClient

_log = logging.getLogger(__package__)
_BATCH = 256
"""Requests submitted in one call."""
_RETRY_S = 1.0
"""Seconds between two tries to reach a gateway that does not answer."""
_ENDING_S = 0.2
"""Seconds between two calls of abort: a request that the gateway has not recorded yet is unknown to the first."""


class Generations:
    """One request per call of `generate`; made in the event loop that uses it.

    Args:
        connect_control: opens the session that aborts requests; called at the first abort, because it needs the control key.
        address: of the gateway, for messages.
        patience: seconds; the client's `timeout`.
    """

    def __init__(self, client: AsyncRolloutClient, connect_control: Callable[[], ServiceControl], *, address: str,
                 patience: float) -> None:
        self._client, self._connect_control, self._address, self._patience = client, connect_control, address, patience
        self._control: ServiceControl | None = None
        self._waiting: dict[str, asyncio.Future[Trajectory]] = {}
        self._queue: list[RolloutRequest] = []
        self._unwanted = set[str]()  # nobody waits for these, and the service may have them
        self._cancelling = set[asyncio.Task[None]]()
        self._arrived, self._submitted, self._open = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._open.set()
        self._turning_away, self._ending, self._submitting = False, asyncio.Lock(), asyncio.Lock()
        self._tasks = [asyncio.create_task(self._submit()), asyncio.create_task(self._take())]

    @property
    def unfinished(self) -> int:
        """Requests that were let in and are not answered."""
        return len(self._waiting)

    async def generate(self, request: RolloutRequest) -> Trajectory | None:
        """The trajectory of a request of one sample; None when it was turned away at the gate.

        Raises RequestRefused when the service cannot serve it, StorageError when it was not submitted, TransportError when the
        gateway is gone.
        """
        if not self._open.is_set():
            if self._turning_away:
                return None
            await self._open.wait()
        future = self._waiting[request.id] = asyncio.get_running_loop().create_future()
        self._queue.append(request)
        self._arrived.set()
        try:
            return await future
        except asyncio.CancelledError:
            if request in self._queue:
                self._queue.remove(request)
            else:  # in a task of its own, which another cancellation of this one does not end
                ending = asyncio.create_task(self._cancel(request.id))
                self._cancelling.add(ending)
                ending.add_done_callback(self._cancelling.discard)
                await asyncio.shield(ending)
            raise
        finally:
            self._waiting.pop(request.id, None)

    async def _cancel(self, name: str) -> None:
        async with self._submitting:
            pass  # while its batch is submitted, the client may not know it
        try:
            await self._client.cancel([name])
        except BlockrollError as error:
            _log.warning("request %s is cancelled once the gateway answers: %s", name, error)
            self._unwanted.add(name)
            self._submitted.set()

    def close_gate(self, turn_away: bool = False) -> None:
        """Lets no further request in, until `open_gate`. With `turn_away` those that arrive are answered at once, with None."""
        self._turning_away = turn_away
        self._open.clear()

    def open_gate(self) -> None:
        """Lets requests in."""
        self._turning_away = False
        self._open.set()

    async def abort(self) -> int:
        """Ends the requests that were let in, with the tokens that they have; returns how many, when all are answered.

        Raises TransportError without the control key.
        """
        async with self._ending:
            ended = dict(self._waiting)
            while left := {name: future for name, future in ended.items() if not future.done()}:
                await asyncio.to_thread(self._abort, sorted(left))
                await asyncio.wait(left.values(), timeout=_ENDING_S)
        return len(ended)

    async def reset_prefix_cache(self) -> None:
        """Has the engines forget K/V of requests that have ended."""
        async with self._ending:
            await asyncio.to_thread(lambda: self._session().reset_prefix_cache())

    async def close(self) -> None:
        """Ends the tasks and closes the connections. What waits raises CancelledError."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for future in self._waiting.values():
            future.cancel()
        if self._control is not None:
            await asyncio.to_thread(self._control.close)
        await self._client.close()
        await asyncio.gather(*self._cancelling, return_exceptions=True)

    def _session(self) -> ServiceControl:
        if self._control is None:
            self._control = self._connect_control()
        return self._control

    def _abort(self, names: list[str]) -> None:
        self._session().abort(names)

    async def _submit(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._queue:
                batch, self._queue = self._queue[:_BATCH], self._queue[_BATCH:]
                async with self._submitting:
                    await self._record(batch)

    async def _record(self, batch: list[RolloutRequest]) -> None:
        """Submits requests. One that cannot travel, or has an id twice, fails alone."""
        try:
            await self._client.submit(batch)
        except RequestError as error:
            if len(batch) > 1:
                for request in batch:
                    await self._record([request])
            else:
                self._fail(batch[0].id, error)
        except BlockrollError as error:
            # The client submits them again in its next session.
            self._unwanted.update(request.id for request in batch)
            for request in batch:
                self._fail(request.id, error)
        self._submitted.set()

    async def _take(self) -> None:
        while True:
            await self._submitted.wait()
            self._submitted.clear()
            try:
                if unwanted := sorted(self._unwanted):
                    await self._client.cancel(unwanted)
                    self._unwanted.difference_update(unwanted)
                async for trajectory in self._client.results():
                    if (future := self._waiting.get(trajectory.request_id)) is not None and not future.done():
                        future.set_result(trajectory)
            except RequestRefused as refused:
                self._fail(refused.request_id, refused)
                self._submitted.set()
            except BlockrollError as error:  # of a gateway that ends, too: the next life has the requests
                _log.warning("no trajectories: %s; trying again", error)
                await self._reach(error)
                self._submitted.set()

    async def _reach(self, error: BlockrollError) -> None:
        """Returns when the gateway answers. Fails the calls that wait where it has not for `patience` seconds."""
        since = time.monotonic()
        while True:
            await asyncio.sleep(_RETRY_S)
            try:
                await self._client.status()
                return
            except BlockrollError as again:
                error = again
            if (silent := time.monotonic() - since) >= self._patience:
                self._give_up(TransportError(
                    f"the service at {self._address} has not answered for {silent:.0f} s ({error}); see `blockroll status`, "
                    "start it again with `blockroll up`, or give a longer `timeout` in rollout.engine_kwargs.blockroll"))

    def _give_up(self, error: TransportError) -> None:
        """Fails the calls that wait. What of them is not submitted yet is not submitted."""
        queued = {request.id for request in self._queue}
        self._queue.clear()
        self._unwanted |= self._waiting.keys() - queued
        for name in list(self._waiting):
            self._fail(name, error)

    def _fail(self, name: str, error: BlockrollError) -> None:
        if (future := self._waiting.get(name)) is not None and not future.done():
            future.set_exception(error)
