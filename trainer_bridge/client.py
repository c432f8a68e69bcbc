"""The trainer's end of the bridge: requests in, each trajectory once, weights back.

Invariants:
- Imports neither torch, Ray, an engine nor SQLite.
- Within the life of a client every trajectory is handed out once: connections may break and gateways may die and come
  back in between.
- A trajectory is acknowledged after the caller came back for something else (see RolloutClient), so one that a killed
  trainer was still working on is delivered to its next life.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Literal, Self

from ..errors import InvalidInput, RequestError, TransportError
from ..rollout.backend import IN_FLIGHT_POLICIES
from ..rollout.types import RolloutRequest, Trajectory, order_by_id
from .connection import Connection, RequestRefused
from .control import ControlPlane
from .delivery import Deliveries, Figures
from .keys import ClientKeys, CurveKeys
from .records import FAILURE
from .tracks import Item

__all__ = ["ClientKeys", "CurveKeys", "RequestRefused", "RolloutClient", "connect"]

OnError = Literal["raise", "skip"]
_CLOSE_S = 5.0


class RolloutClient:
    """A trainer's connection to a gateway; made by `connect`. One thread at a time. A context manager.

    Acknowledgement: with ack="auto" what was handed out is acknowledged, without waiting for the gateway's receipt, at the
    caller's next call of `submit`, `generate` or `push_weights`, at the next item of `results`, and on leaving the
    context without an exception. With ack="manual" only `acknowledge` does it, for a trainer that first makes its own
    checkpoint. After a crash, connect with the same client_id and submit the same requests: what was not acknowledged
    comes (again), what was is refused by name. A trainer that resumes from a checkpoint first acknowledges the requests whose
    work the checkpoint holds (`acknowledge` takes requests, too), then submits those that follow.

    To work while engines decode: `submit` a batch, do what is to be done, then `generate` the same batch, which collects it.
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
        self._control: ControlPlane | None = None
        self._closed = False
        self._connection = Connection(address, self.client_id, keys=keys, control=False, timeout=timeout)
        self._deliveries = Deliveries(self._connection)
        try:
            self._deliveries.drive(lambda: True)
        except BaseException:
            self._connection.drop()
            raise

    @property
    def delivery(self) -> dict[str, int]:
        """Samples in this client's life: `requested`, `unique` (handed out), `duplicates` (dropped here), `failed`, and
        `missing` = requested - unique - failed."""
        book = self._deliveries.book
        return {"requested": book.requested, "unique": book.unique, "duplicates": book.duplicates,
                "failed": book.failed, "missing": book.requested - book.unique - book.failed}

    @property
    def version(self) -> int:
        """The weight version that served when the gateway last spoke."""
        return self._connection.version

    def submit(self, requests: Iterable[RolloutRequest]) -> None:
        """Hands one batch to the gateway; returns when every request is in its ledger.

        The batch is dispatched as one. A request that is in flight already is left as it is. Raises RequestError for an
        id that was used with other content or answered before, StorageError when the gateway cannot record.
        """
        self._enter()
        book = self._deliveries.book
        name = book.enqueue(list(requests))
        self._deliveries.drive(lambda: book.recorded(name))

    def results(self, timeout: float | None = None, *, on_error: OnError = "raise") -> Iterator[Trajectory]:
        """Each trajectory of the submitted requests once, as it arrives; ends when nothing is outstanding.

        Raises TransportError when none arrives for `timeout` seconds (None: as long as the gateway answers), and
        RequestRefused for a request that cannot be served, unless on_error is "skip"; call again to go on after either.
        """
        book = self._deliveries.book
        while True:
            self._enter()
            self._deliveries.drive(lambda: bool(book.inbox) or not book.outstanding, timeout)
            if not book.inbox:
                return
            item = book.take()
            if isinstance(item, RequestRefused):
                self._hand(item.request_id, FAILURE)
                if on_error == "raise":
                    raise item
                self._skip([item.request_id])
                continue
            trajectory = item.open()
            self._hand(*trajectory.key)
            yield trajectory

    def generate(self, requests: Iterable[RolloutRequest], timeout: float | None = None, *,
                 on_error: OnError = "raise") -> list[Trajectory]:
        """Submits one batch and waits for all its samples, ordered by (id, sample) whatever order they arrived in.

        Requests that were submitted before are waited for, not asked for again. Raises RequestRefused for the first request
        that cannot be served (its `others` tell of the rest), after all others are done; those stay to be had from
        `results`. With on_error="skip" the others are returned. `timeout` as in `results`.
        """
        self._enter()
        book, batch = self._deliveries.book, list(requests)
        wanted = {r.id for r in batch}
        if len(wanted) != len(batch):
            raise RequestError("id", "two requests of one call share an id", "give each request its own")
        book.enqueue(batch)
        for name in wanted:
            if book.tracks[name].taken:
                raise RequestError("id", f"{name!r} was handed out in part by results()", "go on with results()")
        found: list[tuple[Item, Trajectory]] = []
        aside: list[Item | RequestRefused] = []
        refused: dict[str, RequestRefused] = {}

        def done() -> bool:
            while book.inbox:
                item = book.take()
                if item.request_id not in wanted:
                    aside.append(item)
                elif isinstance(item, RequestRefused):
                    refused[item.request_id] = item
                else:
                    found.append((item, item.open()))
            return all(book.tracks[name].complete for name in wanted)

        try:
            self._deliveries.drive(done, timeout)
        except BaseException:
            book.inbox.extendleft(reversed([*aside, *refused.values(), *(item for item, _ in found)]))
            raise
        for name in wanted:
            if book.tracks[name].elsewhere:
                refused.setdefault(name, RequestRefused(
                    name, f"{book.tracks[name].elsewhere} samples were acknowledged in an earlier life of this client"))
        for name in refused:
            self._hand(name, FAILURE)
        served = [] if refused and on_error == "raise" else [p for p in found if p[0].request_id not in refused]
        if len(served) < len(found):
            aside += [item for item, _ in found if not served or item.request_id in refused]
        book.inbox.extendleft(reversed(aside))
        if refused and on_error == "raise":
            first, *others = (refused[name] for name in sorted(refused))
            first.others = tuple(others)
            raise first
        self._skip(refused)
        trajectories = order_by_id([trajectory for _, trajectory in served])
        for trajectory in trajectories:
            self._hand(*trajectory.key)
        return trajectories

    def acknowledge(self, done: Iterable[Trajectory | RequestRefused | RolloutRequest]) -> None:
        """With ack="manual": these are safe with the trainer and never delivered again; waits until recorded.

        Args:
            done: trajectories; refusals, with their `others`; or requests, each of which stands for all its samples and its
                refusal, whether this life of the client was handed them or not. What the ledger does not have yet cannot be
                acknowledged and is delivered.
        """
        self._begin()
        handed = dict.fromkeys(self._handed)
        keys: dict[tuple[str, int], None] = {}
        whole: set[str] = set()
        for item in done:
            if isinstance(item, RolloutRequest):
                track = self._deliveries.book.tracks.get(item.id)
                samples = range(item.samples) if track is None or not track.record else track.seen
                keys.update(((item.id, i), None) for i in samples)
                keys[item.id, FAILURE] = None
                whole.add(item.id)
            elif isinstance(item, RequestRefused):
                keys.update((k, None) for r in (item, *item.others) if (k := (r.request_id, FAILURE)) in handed)
            elif item.key in handed:
                keys[item.key] = None
        self._deliveries.acknowledge(list(keys))
        self._handed = [k for k in self._handed if k not in keys]
        self._deliveries.drive(lambda: not self._deliveries.acknowledging)
        self._deliveries.book.forget(whole)

    def push_weights(self, version: int, tensors: Mapping[str, Any], *, allow_gap: bool = False,
                     in_flight: str = "finish") -> int:
        """Makes NumPy arrays or torch tensors the weights that serve; returns the version when every engine has it.

        Args:
            version: the serving version + 1, or any greater one with `allow_gap`. One that was committed already with the
                same content is left as it is.
            tensors: every tensor of the policy by name, finite, of its shapes and dtypes; `policy.state_dict()` will do. A head
                that is tied to the embedding may be among them, for the price of its bytes.
            in_flight: what happens to sequences in flight at the commit: `finish` waits for them; `keep` goes on, each
                token tagged with its version; `recompute` prefills them again under the new weights; `abort` ends them
                where they are. A cluster may offer `finish` alone.

        Raises TransportError (wrong tensors, version or digest; no control key; no gateway), ClusterError (the engines
        could not take it) or StorageError (the gateway's disk is full): the old version then serves.
        """
        if type(version) is not int or version < 1:
            raise InvalidInput("version", f"{version!r} is not a positive integer", "count versions from 1")
        if in_flight not in IN_FLIGHT_POLICIES:
            raise InvalidInput("in_flight", f"unknown policy {in_flight!r}", f"use one of {', '.join(IN_FLIGHT_POLICIES)}")
        self._enter()
        self._deliveries.drive(lambda: not self._deliveries.acknowledging)
        serving = self._plane().push(version, tensors, allow_gap=allow_gap, in_flight=in_flight)
        self._connection.version = serving
        return serving

    def status(self) -> Figures:
        """Figures of the gateway: `version`, `in_flight`, `requested`, `unique`, `duplicates`, `missing`, `failed`,
        `acknowledged`, `stale`, `sessions`, `malformed`, `notice`, and the engines' own as `engine.NAME`."""
        self._begin()
        return self._deliveries.status()

    def shutdown_gateway(self) -> None:
        """Stops the gateway; what is unfinished or not acknowledged stays in its ledger."""
        self._begin()
        self._plane().shutdown()

    def close(self, *, acknowledge: bool = True) -> None:
        """Acknowledges what was handed out (ack="auto") and frees the sockets; safe to call twice.

        A gateway that is away is not waited for: what could not be acknowledged is delivered to the next life.
        """
        if self._closed:
            return
        self._closed = True
        d = self._deliveries
        try:
            if acknowledge and self._auto:
                d.acknowledge(self._handed)
            if acknowledge and d.acknowledging:
                end = time.monotonic() + _CLOSE_S
                self._connection.begin()
                d.drive(lambda: time.monotonic() > end or not d.acknowledging, reopen=False)
        finally:
            self._connection.drop()
            if self._control is not None:
                self._control.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close(acknowledge=error is None)

    def _enter(self) -> None:
        """The caller is back: what it was handed before is its own now."""
        self._begin()
        if self._auto:
            self._deliveries.acknowledge(self._handed)
            self._handed = []

    def _begin(self) -> None:
        if self._closed:
            raise TransportError("this client is closed; connect again with the same client_id")
        self._connection.begin()

    def _hand(self, request_id: str, sample: int) -> None:
        self._deliveries.book.hand(request_id, sample)
        self._handed.append((request_id, sample))

    def _skip(self, names: Iterable[str]) -> None:
        """The caller will not hear of these refusals, so that it could not acknowledge them."""
        if not self._auto:
            keys = {(name, FAILURE) for name in names}
            self._deliveries.acknowledge(sorted(keys))
            self._handed = [k for k in self._handed if k not in keys]

    def _plane(self) -> ControlPlane:
        if self._control is None:
            self._control = ControlPlane(self.address, self.client_id, self._keys, self._timeout)
        return self._control


def connect(address: str, *, client_id: str | None = None, keys: ClientKeys | None = None, timeout: float = 30.0,
            ack: Literal["auto", "manual"] = "auto") -> RolloutClient:
    """Connects to a gateway; returns when it has answered.

    Args:
        address: what the gateway calls its `address`, `tcp://HOST:PORT` or `ipc://PATH`; beyond loopback only with `keys`.
        client_id: the trainer's stable name: unfinished work belongs to it and survives both sides' restarts. A random
            one by default, which cannot be resumed. One live connection per client_id.
        keys: the gateway's public key, this client's pair, and a pair for the control plane where weights are pushed.
        timeout: seconds without a word from the gateway after which waiting ends with TransportError.
        ack: when trajectories are acknowledged; see RolloutClient.

    Raises TransportError when the gateway cannot be reached, does not admit the key, or speaks another protocol.
    """
    return RolloutClient(address, client_id=client_id, keys=keys, timeout=timeout, ack=ack)
