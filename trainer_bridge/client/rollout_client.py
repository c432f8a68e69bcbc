"""The trainer's end of the bridge: it submits requests, hands out each trajectory once, and pushes weights.

Invariants:
- Imports neither torch, Ray, an engine nor SQLite.
- In the life of a client every trajectory is handed out once, even when connections break and gateways die and come
  back.
- A trajectory is acknowledged at the caller's next call (see RolloutClient). So the trajectories that a killed trainer
  was still working on are delivered to its next life.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Literal, Self

from ...errors import InvalidInput, RequestError, TransportError
from ...rollout.backend import IN_FLIGHT_POLICIES
from ...rollout.types import RolloutRequest, Trajectory, order_by_id
from ..wire.keys import ClientKeys
from ..wire.messages import Shutdown, Stopping
from ..wire.records import FAILURE
from .collector import Collector
from .connection import Connection, RequestRefused, SessionLost
from .message_loop import Figures, MessageLoop
from .pending_requests import PendingRequests
from .weight_pusher import WeightPusher

OnError = Literal["raise", "skip"]
_CLOSE_S = 5.0
"""Seconds `close` waits for the gateway to confirm the last acknowledgements."""


class RolloutClient:
    """A trainer's connection to a gateway; made by `connect`. One thread at a time. A context manager.

    Acknowledgement: with ack="auto" the trajectories that were handed out are acknowledged at the caller's next call of
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
        self.client_id = client_id or f"client-{uuid.uuid4().hex[:12]}"
        if ack not in ("auto", "manual"):
            raise InvalidInput("ack", f"unknown mode {ack!r}", "use 'auto' or 'manual'")
        if len(self.client_id.encode("utf-8", "replace")) > 100 or not self.client_id.isprintable():
            raise InvalidInput("client_id", f"{self.client_id[:120]!r} is too long or not printable",
                               "use at most 100 bytes of printable text")
        self.address, self._keys, self._timeout, self._auto = address, keys, timeout, ack == "auto"
        self._handed: list[tuple[str, int]] = []
        self._control: Connection | None = None
        self._pusher: WeightPusher | None = None
        self._closed = False
        self._connection = Connection(address, self.client_id, keys=keys, control=False, timeout=timeout)
        self._pending = PendingRequests()
        self._loop = MessageLoop(self._connection, self._pending)
        try:
            self._loop.run_until(lambda: True)
        except BaseException:
            self._connection.drop()
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
        self._enter()
        name = self._pending.submit(list(requests))
        self._loop.run_until(lambda: self._pending.recorded(name))

    def results(self, timeout: float | None = None, *, on_error: OnError = "raise") -> Iterator[Trajectory]:
        """Each trajectory of the submitted requests once, as it arrives; ends when nothing is outstanding.

        Raises TransportError when none arrives for `timeout` seconds (None: as long as the gateway answers), and
        RequestRefused for a request that cannot be served, unless on_error is "skip"; call again to go on after either.
        """
        pending = self._pending
        while True:
            self._enter()
            self._loop.run_until(lambda: bool(pending.inbox) or not pending.outstanding, timeout)
            if not pending.inbox:
                return
            item = pending.take()
            if isinstance(item, RequestRefused):
                self._hand_out(item.request_id, FAILURE)
                if on_error == "raise" and item.request_id not in pending.cancelled:
                    raise item
                self._skip([item.request_id])
                continue
            trajectory = item.open()
            self._hand_out(*trajectory.key)
            yield trajectory

    def generate(self, requests: Iterable[RolloutRequest], timeout: float | None = None, *,
                 on_error: OnError = "raise") -> list[Trajectory]:
        """Submits one batch and waits for all its samples, ordered by (id, sample) whatever order they arrived in.

        Requests that were submitted before are not submitted again. When requests cannot be served, raises the
        RequestRefused of the first one, with the rest in its `others`, once all samples of the call have come;
        `results` then yields the trajectories of the served requests. With on_error="skip" those are returned.
        `timeout` as in `results`.
        """
        self._enter()
        pending, batch = self._pending, list(requests)
        wanted = {r.id for r in batch}
        if len(wanted) != len(batch):
            raise RequestError("id", "two requests of one call share an id", "give each request its own")
        pending.submit(batch)
        for name in wanted:
            if pending.requests[name].handed_out:
                raise RequestError("id", f"{name!r} was handed out in part by results()", "go on with results()")
        collector = Collector(pending, wanted)
        try:
            while True:
                self._loop.run_until(lambda: bool(pending.inbox) or pending.complete(wanted), timeout)
                collector.drain()
                if pending.complete(wanted):
                    break
        except BaseException:
            collector.put_back()
            raise
        found, refused, others = collector.found, collector.refused, collector.others
        for name in wanted:
            if count := pending.requests[name].acknowledged_before:
                refused.setdefault(name, RequestRefused(
                    name, f"{count} samples were acknowledged in an earlier life of this client"))
        for name in refused:
            self._hand_out(name, FAILURE)
        served = [] if refused and on_error == "raise" else [p for p in found if p[0].request_id not in refused]
        if len(served) < len(found):
            others += [item for item, _ in found if not served or item.request_id in refused]
        pending.put_back(others)
        if refused and on_error == "raise":
            first, *rest = (refused[name] for name in sorted(refused))
            first.others = tuple(rest)
            raise first
        self._skip(refused)
        trajectories = order_by_id([trajectory for _, trajectory in served])
        for trajectory in trajectories:
            self._hand_out(*trajectory.key)
        return trajectories

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Ends requests of this client; returns when the gateway's ledger has it.

        Samples that are not finished by then will not come. `generate` reports such a request as refused, with the reason
        "cancelled by its client"; `results` passes over it. The samples that had finished are delivered. Ids that are
        unknown, or of requests that are finished, are ignored. A cancelled id cannot be submitted again.
        """
        self._begin()
        names = list(dict.fromkeys(request_ids))
        self._pending.cancelled.update(names)
        self._loop.run_until(lambda: not any(self._pending.unconfirmed(name) for name in names))
        self._loop.cancel(names, "cancelled by its client")
        self._loop.run_until(lambda: not self._loop.cancelling)

    def acknowledge(self, done: Iterable[Trajectory | RequestRefused | RolloutRequest]) -> None:
        """With ack="manual": the trainer has these for good; they are never delivered again. Waits until that is
        recorded.

        Args: done: trajectories; refusals, which include their `others`; or requests. A request acknowledges all its
            samples and its refusal, whether this life of the client was handed them or not. Samples that are not in the
            ledger yet cannot be acknowledged, and are delivered.
        """
        self._begin()
        handed = dict.fromkeys(self._handed)
        keys: dict[tuple[str, int], None] = {}
        whole: set[str] = set()
        for item in done:
            if isinstance(item, RolloutRequest):
                known = self._pending.requests.get(item.id)
                samples = range(item.samples) if known is None or known.submission is None else known.arrived
                keys.update(((item.id, i), None) for i in samples)
                keys[item.id, FAILURE] = None
                whole.add(item.id)
            elif isinstance(item, RequestRefused):
                keys.update((k, None) for r in (item, *item.others) if (k := (r.request_id, FAILURE)) in handed)
            elif item.key in handed:
                keys[item.key] = None
        self._loop.acknowledge(list(keys))
        self._handed = [k for k in self._handed if k not in keys]
        self._loop.run_until(lambda: not self._loop.acknowledging)
        self._pending.forget(whole)

    def push_weights(self, version: int, tensors: Mapping[str, Any], *, allow_gap: bool = False,
                     in_flight: str = "finish") -> int:
        """Makes NumPy arrays or torch tensors the weights that serve; returns the version when every engine has it.

        Args: version: the serving version + 1, or any greater one with `allow_gap`. A version that was committed
            already with the same content changes nothing. tensors: every tensor of the policy by name, finite, of its
            shapes and dtypes; `policy.state_dict()` will do. A head that is tied to the embedding may be among them;
            its bytes are sent and dropped. Tensors on a device are copied to host memory once, and the copy is kept
            until the push ends. in_flight: what happens to sequences in flight at the commit: `finish` waits for them;
            `keep` goes on, each token tagged with its version; `recompute` prefills them again under the new weights;
            `abort` ends those that have a generated token. A cluster may offer `finish` alone.

        Raises TransportError (wrong tensors, version or digest; no control key; no gateway), ClusterError (the engines
        could not take it) or StorageError (the gateway's disk is full): the old version then serves.
        """
        if type(version) is not int or version < 1:
            raise InvalidInput("version", f"{version!r} is not a positive integer", "count versions from 1")
        if in_flight not in IN_FLIGHT_POLICIES:
            raise InvalidInput("in_flight", f"unknown policy {in_flight!r}", f"use one of {', '.join(IN_FLIGHT_POLICIES)}")
        self._enter()
        self._loop.run_until(lambda: not self._loop.acknowledging)
        if self._pusher is None:
            self._pusher = WeightPusher(self._control_connection())
        serving = self._pusher.push(version, tensors, allow_gap=allow_gap, in_flight=in_flight)
        self._connection.version = serving
        return serving

    def status(self) -> Figures:
        """Figures of the gateway: `version`, `in_flight`, `requested`, `unique`, `duplicates`, `missing`, `failed`,
        `acknowledged`, `stale`, `sessions`, `malformed`, `notice`, and the engines' own as `engine.NAME`."""
        self._begin()
        return self._loop.status()

    def shutdown_gateway(self) -> None:
        """Stops the gateway; returns when the gateway has said that it stops. Its ledger keeps what is not
        acknowledged."""
        self._begin()
        control = self._control_connection()
        while True:
            try:
                if not control.is_open:
                    control.open()
                control.send(Shutdown())
                while not any(isinstance(message, Stopping) for message in control.receive(0.2)):
                    pass
                # The gateway waits until the sessions it has told are closed.
                control.drop()
                return
            except SessionLost:
                control.drop()

    def close(self, *, acknowledge: bool = True) -> None:
        """Acknowledges what was handed out (ack="auto") and closes the sockets; safe to call twice.

        Does not wait for a gateway that is away: what could not be acknowledged is delivered to the next life.
        """
        if self._closed:
            return
        self._closed = True
        loop = self._loop
        try:
            if acknowledge and self._auto:
                loop.acknowledge(self._handed)
            if acknowledge and loop.acknowledging:
                end = time.monotonic() + _CLOSE_S
                self._connection.restart_timeout()
                loop.run_until(lambda: time.monotonic() > end or not loop.acknowledging, reopen=False)
        finally:
            self._connection.drop()
            if self._control is not None:
                self._control.drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close(acknowledge=error is None)

    def _enter(self) -> None:
        """The caller is back, so what it was handed before is acknowledged (ack="auto")."""
        self._begin()
        if self._auto:
            self._loop.acknowledge(self._handed)
            self._handed = []

    def _begin(self) -> None:
        if self._closed:
            raise TransportError("this client is closed; connect again with the same client_id")
        self._connection.restart_timeout()

    def _hand_out(self, request_id: str, sample: int) -> None:
        self._pending.hand_out(request_id, sample)
        self._handed.append((request_id, sample))

    def _skip(self, names: Iterable[str]) -> None:
        """Acknowledges refusals that the caller is not told of and cannot acknowledge itself."""
        if not self._auto:
            keys = {(name, FAILURE) for name in names}
            self._loop.acknowledge(sorted(keys))
            self._handed = [k for k in self._handed if k not in keys]

    def _control_connection(self) -> Connection:
        """The control connection, which counts its timeout from now."""
        if self._control is None:
            self._control = Connection(self.address, self.client_id, keys=self._keys, control=True, timeout=self._timeout)
        self._control.restart_timeout()
        return self._control


def connect(address: str, *, client_id: str | None = None, keys: ClientKeys | None = None, timeout: float = 30.0,
            ack: Literal["auto", "manual"] = "auto") -> RolloutClient:
    """Connects to a gateway; returns when it has answered.

    Args:
        address: the gateway's `address`, `tcp://HOST:PORT` or `ipc://PATH`; beyond loopback only with `keys`.
        client_id: the trainer's stable name: unfinished work belongs to it and survives both sides' restarts. A random
            one by default, which cannot be resumed. One live connection per client_id.
        keys: the gateway's public key, this client's pair, and a pair for control sessions, which push weights.
        timeout: seconds without a message from the gateway after which waiting ends with TransportError.
        ack: when trajectories are acknowledged; see RolloutClient.

    Raises TransportError when the gateway cannot be reached, does not admit the key, or speaks another protocol.
    """
    return RolloutClient(address, client_id=client_id, keys=keys, timeout=timeout, ack=ack)
