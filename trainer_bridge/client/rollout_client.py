"""The trainer's end of the bridge: it submits requests, hands out each trajectory once, and pushes weights.

Invariants:
- Imports neither torch, Ray, an engine nor SQLite.
- In the life of a client every trajectory is handed out once, even when connections break and gateways die and come
  back.
- A trajectory is acknowledged at the caller's next call (see RolloutClient). So the trajectories that a killed trainer
  was still working on are delivered to its next life.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Literal, Self

from ...errors import BlockrollError, RequestError, TransportError
from ...rollout.types import RolloutRequest, Trajectory
from ..wire.keys import ClientKeys
from ..wire.records import FAILURE
from .arguments import (
    OnError,
    check_connection,
    check_on_error,
    check_push,
    check_seconds,
    done_list,
    id_list,
    request_list,
)
from .connection import Connection, RequestRefused
from .control_session import ControlSession
from .generate import collect, joined, refusals, served
from .handed_out import HandedOut, keys_of, opened
from .message_loop import Figures, MessageLoop
from .pending_requests import Arrival, PendingRequests
from .service_control import ServiceControl

CANCELLED = "cancelled by its client"
STOP: ContextVar[threading.Event | None] = ContextVar("stop", default=None)
"""Set to end a call that waits, which raises CallStopped."""
_CLOSE_S, _FAIL_S = 5.0, 0.5
"""Seconds `close` waits for the gateway to confirm the last acknowledgements, and where the client ends by an error."""


class CallStopped(Exception):
    """A call that waits was ended by its STOP. Never leaves the bridge."""


class RolloutClient:
    """A trainer's connection to a gateway; made by `connect`. A context manager. Several threads may call it at the
    same time, for instance one that submits and one that takes results.

    Acknowledgement: with ack="auto" the trajectories that a thread was handed are acknowledged at the thread's next call of
    `submit`, `generate` or `push_weights`, at the next item of `results`, and on leaving the context without an
    exception; the client does not wait for the gateway's confirmation. With ack="manual" only `acknowledge` does it,
    for a trainer that first writes its own checkpoint. After a crash, connect with the same client_id and submit the
    same requests: trajectories that were not acknowledged come again, requests that were wholly acknowledged are
    refused by name. A trainer that resumes from a checkpoint first acknowledges the requests whose work the checkpoint
    holds (`acknowledge` takes requests, too), then submits those that follow.

    To work while engines decode: `submit` a batch, do the work, then `generate` the same batch, which collects it.
    """

    def __init__(self, address: str, *, client_id: str | None = None, keys: ClientKeys | None = None,
                 timeout: float = 30.0, ack: Literal["auto", "manual"] = "auto") -> None:
        check_connection(address, client_id, keys, timeout, ack)
        self.client_id = client_id or f"client-{uuid.uuid4().hex[:12]}"
        self.address, self._timeout, self._auto = address, float(timeout), ack == "auto"
        self._handed = HandedOut()
        self._control = ControlSession(address, self.client_id, keys, self._timeout)
        self._closed = False
        self._connection = Connection(address, self.client_id, keys=keys, control=False, timeout=self._timeout)
        self._pending = PendingRequests()
        self._loop = MessageLoop(self._connection, self._pending)
        try:
            with self._loop.lock:
                self._loop.run_until(lambda: True)
        except BaseException:
            self._connection.close()
            raise

    @property
    def delivery(self) -> dict[str, int]:
        """Samples in this client's life: `requested`, `unique` (handed out), `duplicates` (dropped here), `failed`, and
        `missing` = requested - unique - failed."""
        p = self._pending
        return {"requested": p.requested, "unique": p.unique, "duplicates": p.duplicates, "failed": p.failed,
                "missing": p.missing}

    @property
    def version(self) -> int:
        """The weight version that served according to the gateway's last message."""
        return self._connection.version

    def submit(self, requests: Iterable[RolloutRequest]) -> None:
        """Hands one batch to the gateway; returns when every request is in its ledger.

        The whole batch is dispatched at once. A request that is in flight already is not submitted again. Raises
        RequestError for an id that was used with other content or answered before, StorageError when the gateway cannot
        record.
        """
        batch = request_list(requests)
        with self._loop.lock:
            self._enter()
            name = self._pending.submit(batch)
            self._run_until(lambda: self._pending.recorded(name), batch=name)

    def results(self, timeout: float | None = None, *, on_error: OnError = "raise") -> Iterator[Trajectory]:
        """Each trajectory of the submitted requests once, as it arrives; ends when nothing is outstanding.

        Raises TransportError when none arrives for `timeout` seconds (None: as long as the gateway answers), and
        RequestRefused for a request that cannot be served, unless on_error is "skip"; call again to go on after either.
        """
        check_seconds("timeout", timeout)
        check_on_error(on_error)
        return self._results(timeout, on_error)

    def _results(self, timeout: float | None, on_error: OnError) -> Iterator[Trajectory]:
        while (found := self.take(timeout, on_error)) is not None:
            yield found[1]

    def take(self, timeout: float | None, on_error: OnError) -> tuple[Arrival, Trajectory] | None:
        """The next item of `results`, and how it arrived; None at the end, from where the caller may be away for long."""
        if found := self.take_some(1, timeout, on_error):
            return found[0]
        with self._loop.lock:
            self._loop.send_acks()
        return None

    def take_some(self, most: int, timeout: float | None, on_error: OnError) -> list[tuple[Arrival, Trajectory]]:
        """The items of `results` that have arrived, up to `most`, and how they arrived; waits for the first. Empty at the end."""
        pending = self._pending
        with self._loop.lock:
            while True:
                self._enter()
                self._run_until(lambda: bool(pending.inbox) or not pending.outstanding, timeout)
                if not pending.inbox:
                    return []
                if found := opened(pending, most):
                    for item, _ in found:
                        self._hand_out(item.request_id, item.sample)
                    return found
                refused = pending.take()
                assert isinstance(refused, RequestRefused)
                self._hand_out(refused.request_id, FAILURE)
                if on_error == "raise" and refused.request_id not in pending.cancelled:
                    raise refused
                self._skip([refused.request_id])

    def forget_handed(self, trajectories: Iterable[Trajectory]) -> None:
        """These did not reach the caller: they are not acknowledged, and come again to the next life of the client."""
        with self._loop.lock:
            self._handed.remove({trajectory.key for trajectory in trajectories})

    def wake(self) -> None:
        """Calls that wait look at their STOP."""
        self._connection.wake()

    def give_back(self, item: Arrival) -> None:
        """Undoes `take`: the item is the next one again."""
        with self._loop.lock:
            self._handed.remove({(item.request_id, item.sample)})
            self._pending.take_back(item)

    def generate(self, requests: Iterable[RolloutRequest], timeout: float | None = None, *,
                 on_error: OnError = "raise", deadline_seconds: float | None = None) -> list[Trajectory]:
        """Submits one batch and waits for all its samples, ordered by (id, sample) whatever order they arrived in.

        Requests that were submitted before are not submitted again. When requests cannot be served, raises the
        RequestRefused of the first one, with the rest in its `others`, once all samples of the call have come;
        `results` then yields the trajectories of the served requests. With on_error="skip" those are returned.
        `timeout` as in `results`. Requests that are unfinished after `deadline_seconds` are cancelled, and refused with
        that reason; `results` yields the samples of them that had finished.
        """
        batch = request_list(requests)
        check_seconds("timeout", timeout)
        check_seconds("deadline_seconds", deadline_seconds)
        check_on_error(on_error)
        wanted = {r.id for r in batch}
        if len(wanted) != len(batch):
            raise RequestError("id", "two requests of one call share an id", "give each request its own")
        with self._loop.lock:
            self._enter()
            return self._generate(batch, wanted, timeout, on_error, deadline_seconds)

    def _generate(self, batch: list[RolloutRequest], wanted: set[str], timeout: float | None, on_error: OnError,
                  deadline_s: float | None) -> list[Trajectory]:
        pending = self._pending
        name = pending.submit(batch)
        for request_id in wanted:
            if pending.requests[request_id].handed_out:
                raise RequestError("id", f"{request_id!r} was handed out in part by results()", "go on with results()")
        collector = collect(pending, wanted, deadline_s, self._loop.cancel,
                            lambda done: self._run_until(done, timeout, batch=name))
        refused = refusals(collector, pending, wanted)
        for request_id in refused:
            self._hand_out(request_id, FAILURE)
        trajectories = served(collector, pending, refused, on_error)
        if refused and on_error == "raise":
            raise joined(refused)
        self._skip(refused)
        for trajectory in trajectories:
            self._hand_out(*trajectory.key)
        return trajectories

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Ends requests of this client; returns when the gateway's ledger has it.

        Samples that are not finished by then will not come. `generate` reports such a request as refused, with the reason
        "cancelled by its client"; `results` passes over it. The samples that had finished are delivered. Ids that are
        unknown, or of requests that are finished, are ignored. A cancelled id cannot be submitted again.
        """
        names = id_list(request_ids)
        with self._loop.lock:
            self._begin()
            self._run_until(lambda: not any(self._pending.unconfirmed(name) for name in names))
            self._pending.cancelled.update(name for name in names if name in self._pending.requests)
            numbers = self._loop.cancel(names, CANCELLED)
            self._run_until(lambda: self._loop.confirmed(numbers))

    def acknowledge(self, done: Iterable[Trajectory | RequestRefused | RolloutRequest]) -> None:
        """With ack="manual": the trainer has these for good; they are never delivered again. Waits until that is
        recorded.

        Args: done: trajectories; refusals, which include their `others`; or requests. A request acknowledges all its
            samples and its refusal, whether this life of the client was handed them or not. Samples that are not in the
            ledger yet cannot be acknowledged, and are delivered.
        """
        items = done_list(done, (Trajectory, RequestRefused, RolloutRequest))
        with self._loop.lock:
            self._begin()
            handed = set(self._handed.all())
            found, whole = keys_of(items, handed, self._pending)
            self._loop.acknowledge(list(found))
            self._handed.remove(found)
            self._run_until(self._loop.confirmation())
            self._pending.forget(whole)

    def push_weights(self, version: int, tensors: Mapping[str, Any], *, allow_gap: bool = False,
                     in_flight: str = "finish") -> int:
        """Makes NumPy arrays or torch tensors the weights that serve; returns the version when every engine has it.

        Args: version: the serving version + 1, or any greater one with `allow_gap`. A version that was committed
            already with the same content changes nothing. tensors: every tensor of the policy by name, finite, of its
            shapes and dtypes; `policy.state_dict()` will do, a tied head included. Only tensors that differ
            from those that serve are sent. Tensors on a device are copied to host memory once, and the copy is kept
            until the push ends. in_flight: what happens to sequences in flight at the commit: `finish` waits for them;
            `keep` goes on, each token tagged with its version; `recompute` prefills them again under the new weights;
            `abort` ends those that have a generated token. A cluster may offer `finish` alone.

        Raises TransportError (wrong tensors, version or digest; no control key; no gateway), ClusterError (the engines
        could not take it) or StorageError (the gateway's disk is full): the old version then serves.
        """
        check_push(version, tensors, allow_gap, in_flight)
        with self._loop.lock:
            self._enter()
            self._run_until(self._loop.confirmation())
        serving = self._control.push(version, tensors, allow_gap=allow_gap, in_flight=in_flight)
        with self._loop.lock:
            self._connection.version = max(serving, self._connection.version)
        return serving

    def status(self) -> Figures:
        """Figures of the gateway: `version`, `in_flight`, `requested`, `unique`, `duplicates`, `missing`, `failed`,
        `acknowledged`, `stale`, `sessions`, `malformed`, `notice`, and the engines' own as `engine.NAME`."""
        with self._loop.lock:
            self._begin()
            return self._loop.status()

    def control(self) -> ServiceControl:
        """A session with the gateway, by this client's control key, that pauses and resumes generation, aborts requests of any
        client, and loads or labels weight versions. A context manager; open one per thread."""
        return self._control.another()

    def shutdown_gateway(self) -> None:
        """Stops the gateway; returns when it has said that it stops. Its ledger keeps what is not acknowledged."""
        with self._loop.lock:
            self._begin()
        self._control.shutdown()

    def close(self, *, acknowledge: bool = True) -> None:
        """Acknowledges what was handed out (ack="auto"; not with `acknowledge` False) and closes the sockets; safe to call twice.
        Does not wait for a gateway that is away: what could not be acknowledged is delivered to the next life."""
        loop = self._loop
        with loop.lock:
            if self._closed:
                return
            self._closed = True
            loop.stop()
            try:
                if acknowledge and self._auto:
                    loop.acknowledge(self._handed.all())
                if loop.acknowledging:
                    end = time.monotonic() + (_CLOSE_S if acknowledge else _FAIL_S)
                    confirmed = loop.confirmation()
                    self._connection.restart_timeout()
                    loop.run_until(lambda: time.monotonic() > end or confirmed(), reopen=False)
            except BlockrollError:
                if acknowledge:  # otherwise the caller has an error of its own
                    raise
            finally:
                loop.closed = True
                self._connection.close()
        self._control.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close(acknowledge=error is None)

    def _enter(self) -> None:
        """The caller is back, so what it was handed before is acknowledged (ack="auto")."""
        self._begin()
        if self._auto:
            self._loop.acknowledge(self._handed.pop())

    def _begin(self) -> None:
        if self._closed:
            raise TransportError("this client is closed; connect again with the same client_id")
        self._connection.restart_timeout()

    def _run_until(self, done: Callable[[], bool], timeout: float | None = None, *, batch: str = "") -> None:
        """The loop's, which ends with CallStopped when the caller's STOP is set."""
        stop = STOP.get()
        if stop is None:
            self._loop.run_until(done, timeout, batch=batch)
            return
        self._loop.run_until(lambda: stop.is_set() or done(), timeout, batch=batch)
        if stop.is_set() and not done():
            raise CallStopped

    def _hand_out(self, request_id: str, sample: int) -> None:
        self._pending.hand_out(request_id, sample)
        self._handed.add((request_id, sample))

    def _skip(self, names: Iterable[str]) -> None:
        """Acknowledges refusals that the caller is not told of and cannot acknowledge itself."""
        if not self._auto:
            keys = {(name, FAILURE) for name in names}
            self._loop.acknowledge(sorted(keys))
            self._handed.remove(keys)
