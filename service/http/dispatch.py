"""Sends requests to the gateway as one of its clients, and brings what comes of them to the coroutines that wait.

Invariants:
- One thread submits and cancels, another one takes trajectories; the event loop never waits for the gateway.
- Trajectories that have come together wake the event loop once. Under load those of TAKE_S have come together.
- Requests that arrive while a batch is being recorded are the next batch, so one write to the ledger serves many.
- Whatever ends the wait for a request, a disconnect or an error, cancels what is unfinished of it.
- An HTTP request is answered to its connection. A service that starts drops what its former life has left unfinished.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from ...errors import BlockrollError, RequestError, TransportError
from ...rollout.backend import Progress
from ...rollout.types import RolloutRequest, Trajectory
from ...trainer_bridge.client import RequestRefused, RolloutClient
from ...trainer_bridge.gateway import Gateway
from ...trainer_bridge.wire.keys import ClientKeys
from . import HTTP_CLIENT
from .http_errors import HttpError

_log = logging.getLogger(__package__)
MAX_BATCH = 256
"""Requests submitted in one call."""
BUSY, GATHER_S = 16, 0.01
"""While so many requests are unfinished, a batch waits so many seconds for others: each batch is two writes to the ledger and a
call of an engine, and where so many are at work a request takes far longer than that."""
TAKE_S = 0.005
"""Seconds between two looks for trajectories while so many are unfinished. A look costs as much for one as for many, and so does
what comes behind it: one wake-up of the event loop."""
RETRY_S = 1.0
"""Seconds between two tries to take trajectories from a gateway that does not answer."""


class Answers:
    """What comes of some requests: an async iterator of trajectories, and of `Progress` before them where it was asked for. Also
    an async context manager that cancels what is unfinished at its end. Iterating raises what made a request fail."""

    def __init__(self, dispatch: Dispatch, requests: Sequence[RolloutRequest]) -> None:
        self.requests = requests
        self._dispatch, self.loop = dispatch, asyncio.get_running_loop()
        self._queue: asyncio.Queue[Trajectory | Progress | Exception] = asyncio.Queue()
        self._missing = sum(request.samples for request in requests)

    def put(self, item: Trajectory | Progress | Exception) -> None:
        """Hands an item to whoever waits. Any thread."""
        call_in(self.loop, self.enter, item)

    def enter(self, item: Trajectory | Progress | Exception) -> None:
        """`put`, from the event loop."""
        self._queue.put_nowait(item)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Trajectory | Progress:
        if not self._missing:
            raise StopAsyncIteration
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        self._missing -= isinstance(item, Trajectory)
        return item

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        self._dispatch.end(self)


class Dispatch:
    """The HTTP face as a client of the gateway.

    Args:
        keys: of the gateway.
        most: samples that may be unfinished at once.

    Attributes:
        refuses: whether new requests are answered with 503, because generation is paused.
    """

    def __init__(self, gateway: Gateway, keys: ClientKeys | None, most: int) -> None:
        self._client = RolloutClient(gateway.address, client_id=HTTP_CLIENT, keys=keys)
        self._progress = gateway.progress
        self._most, self._life = most, uuid.uuid4().hex[:12]
        self.refuses: Callable[[], bool] = lambda: False
        self._lock = threading.Lock()
        self._waiting: dict[str, Answers] = {}
        self._samples: dict[str, int] = {}
        self._number = self._held = 0
        self._commands: queue.SimpleQueue[list[RolloutRequest] | list[str] | None] = queue.SimpleQueue()
        self._submitted = threading.Event()
        self._closing = False
        self._threads = [threading.Thread(target=self._run, args=(work,), name=f"blockroll-http{work.__name__}", daemon=True)
                         for work in (self._submit, self._take)]  # fmt: skip
        for thread in self._threads:
            thread.start()

    @property
    def version(self) -> int:
        """The weight version that serves, according to the gateway's last message."""
        return self._client.version

    @property
    def unfinished(self) -> int:
        """Samples that HTTP clients wait for."""
        with self._lock:
            return self._held + sum(self._samples.values())

    def new_id(self) -> str:
        """An id for a request, unique over the lives of the service."""
        self._number += 1
        return f"{self._life}-{self._number}"

    def open(self, requests: Sequence[RolloutRequest], progress: bool = False, admitted: bool = False) -> Answers:
        """Submits requests; use the result as `async with dispatch.open(...) as answers`. Called in the event loop.

        Args:
            progress: also bring what samples make before they end.
            admitted: they are further work of an HTTP request that was admitted before. A pause queues them, and they are not
                refused for others that came meanwhile: what was made for the request would be lost.

        Raises HttpError (429) where too many samples are unfinished.
        """
        answers = Answers(self, requests)
        with self._lock:
            self._admit(None if admitted else sum(request.samples for request in requests))
            for request in requests:
                self._waiting[request.id] = answers
                self._samples[request.id] = request.samples
        for request in requests if progress else ():
            self._progress.watch(request.id, answers.put)
        self._commands.put(list(requests))
        return answers

    def admit(self, samples: int) -> None:
        """Admits an HTTP request that opens its work later, with `admitted`: so many samples count as unfinished until `hold`
        says otherwise. Raises as `open` does."""
        with self._lock:
            self._admit(samples)
            self._held += samples

    def hold(self, samples: int) -> None:
        """So many more samples, or fewer, count as unfinished, of requests that were admitted and have none open now."""
        with self._lock:
            self._held += samples

    def _admit(self, wanted: int | None) -> None:
        """Raises HttpError where these samples may not begin. None: they were admitted before."""
        if wanted is not None and self.refuses():
            raise HttpError(503, "generation is paused; send the request again after /resume", code="paused")
        if self._closing:
            raise HttpError(503, "the service stops", code="unavailable")
        if wanted is not None and self._held + sum(self._samples.values()) + wanted > self._most:
            raise HttpError(429, f"more than {self._most} samples would be unfinished (http.max_unfinished); try again later",
                            code="rate_limit_exceeded")

    def end(self, answers: Answers) -> None:
        """Cancels what is unfinished of these."""
        for request in answers.requests:
            self._progress.unwatch(request.id)
        with self._lock:
            left = [request.id for request in answers.requests if self._waiting.pop(request.id, None) is not None]
            for name in left:
                del self._samples[name]
        if left:
            self._commands.put(left)

    def close(self) -> None:
        """Ends every wait with an error, and the threads."""
        with self._lock:
            self._closing = True
        self._fail(None, TransportError("the service stops"))
        self._commands.put(None)
        self._submitted.set()
        self._client.close()
        for thread in self._threads:
            thread.join()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            # A bug: whoever waits is told, and the traceback goes to the thread's hook.
            self._closing = True
            self._fail(None, error if isinstance(error, Exception) else TransportError("the service stops"))
            raise

    def _submit(self) -> None:
        stop = False
        while not stop:
            batch, cancelled = list[RolloutRequest](), list[str]()
            item = self._commands.get()
            if len(self._waiting) >= BUSY and not self._closing:
                time.sleep(GATHER_S)
            while True:
                stop = item is None
                for each in item or ():
                    if isinstance(each, str):
                        cancelled.append(each)
                    else:
                        batch.append(each)
                if stop or self._commands.empty() or len(batch) >= MAX_BATCH:
                    break
                item = self._commands.get()
            with self._lock:  # one whose client has gone already is not submitted
                batch = [request for request in batch if request.id in self._waiting]
            try:
                self._record(batch)
                if cancelled:
                    self._client.cancel(cancelled)
            except BlockrollError as error:
                _log.warning("%d requests cannot be submitted: %s", len(batch), error)
                names = [request.id for request in batch]
                self._fail(names, error)
                if names:  # the gateway may have some of them
                    self._commands.put([*names, *cancelled])

    def _record(self, batch: Sequence[RolloutRequest]) -> None:
        """Submits requests. One that cannot travel, or has an id twice, fails alone."""
        try:
            if batch:
                self._client.submit(batch)
        except RequestError as error:
            if len(batch) > 1:
                for request in batch:
                    self._record([request])
            else:
                self._fail([batch[0].id], error)
        self._submitted.set()

    def _take(self) -> None:
        while not self._closing:
            self._submitted.clear()
            try:
                while found := self._client.take_some(MAX_BATCH, None, "raise"):
                    self._deliver([trajectory for _, trajectory in found])
                    if len(self._waiting) >= BUSY and not self._closing:
                        time.sleep(TAKE_S)
            except RequestRefused as refused:
                self._fail([refused.request_id], HttpError(400, refused.why, refused.why.partition(":")[0]))
                continue
            except BlockrollError as error:
                if self._closing:
                    return
                _log.warning("no trajectories for HTTP: %s", error)
                if ended := self._fail(None, error):
                    self._commands.put(ended)
                self._submitted.wait(RETRY_S)
                continue
            self._submitted.wait()

    def _deliver(self, trajectories: Sequence[Trajectory]) -> None:
        """Hands trajectories to whoever waits, and wakes each event loop once."""
        found = dict[asyncio.AbstractEventLoop, list[tuple[Answers, Trajectory]]]()
        with self._lock:
            for trajectory in trajectories:
                name = trajectory.request_id
                if (answers := self._waiting.get(name)) is None:
                    continue
                self._samples[name] -= 1
                if not self._samples[name]:
                    del self._samples[name], self._waiting[name]
                found.setdefault(answers.loop, []).append((answers, trajectory))
        for loop, items in found.items():
            call_in(loop, _enter, items)

    def _fail(self, names: Sequence[str] | None, error: Exception) -> list[str]:
        """Ends the wait for these requests, or for all, with an error; returns the ids of those that were waited for."""
        with self._lock:
            ended = list(self._waiting) if names is None else [name for name in names if name in self._waiting]
            failed = [self._waiting.pop(name) for name in ended]
            for name in list(self._samples):
                if name not in self._waiting:
                    del self._samples[name]
        for answers in failed:
            answers.put(error)
        return ended


def _enter(items: Sequence[tuple[Answers, Trajectory]]) -> None:
    for answers, trajectory in items:
        answers.enter(trajectory)


def call_in(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> None:
    """Calls a function in an event loop, unless that is closed. Any thread."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        _log.debug("the loop of a request is closed")
