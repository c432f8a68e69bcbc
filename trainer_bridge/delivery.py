"""What a client asked for, what arrived, what it acknowledged: the state behind RolloutClient, kept across sessions.

Invariants:
- Every (request id, sample) enters the inbox once in a client's life, whatever is sent again.
- A new session first repeats the acknowledgements nobody confirmed, then submits what is unfinished; both are idempotent.
- Undelivered bytes in the inbox stay below WINDOW plus one trajectory, except those the caller set aside.
- A request id is forgotten when all of it is answered, acknowledged and confirmed: the gateway never sends it again.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ..errors import BlockrollError, RequestError, TransportError
from ..rollout.types import RolloutRequest, Trajectory
from .connection import Connection, RequestRefused, SessionLost, refusal
from .messages import (
    MAX_ACKS,
    MAX_PER_SUBMIT,
    Ack,
    Acked,
    Credit,
    Delivery,
    Failure,
    Message,
    Refused,
    Status,
    StatusRequest,
    Submit,
    Submitted,
)
from .records import decode_trajectory, encode_request

WINDOW = 64 << 20
"""Bytes of deliveries the gateway may send ahead of the caller."""
FAILURE = -1
"""Sample number that stands for the failure of a whole request."""
_SUBMITS, _ACKS, _PART_BYTES, _WAIT_S = 4, 8, 4 << 20, 0.2
Figures = dict[str, float | int | str]


@dataclass(slots=True)
class Track:
    """One request id: samples `seen` arrived, `taken` were handed out, `confirmed` are recorded as acknowledged.

    `samples` is 0 and `record` empty until it is submitted in this life; `told` counts acknowledgements sent, `elsewhere`
    samples acknowledged in an earlier life.
    """

    record: bytes = b""
    samples: int = 0
    batch: str = ""
    failed: str = ""
    elsewhere: int = 0
    seen: set[int] = field(default_factory=set)
    taken: set[int] = field(default_factory=set)
    confirmed: set[int] = field(default_factory=set)
    told: int = 0

    @property
    def complete(self) -> bool:
        """Nothing more of it will arrive."""
        return bool(self.failed) or len(self.seen) + self.elsewhere >= self.samples

    def all_in(self, done: set[int]) -> bool:
        """It is complete, and what arrived, or its failure, is in `done`."""
        return self.complete and self.seen <= done and (not self.failed or FAILURE in done)


@dataclass(slots=True)
class _Batch:
    """Requests submitted in one call, and how far their parts have come in this session."""

    ids: list[str]
    open: int
    parts: list[list[str]] = field(default_factory=list)
    told: list[list[int]] = field(default_factory=list)
    recorded: int = 0


@dataclass(frozen=True, slots=True)
class Item:
    """A trajectory that arrived and was not handed out; `size` is what it takes of the window."""

    request_id: str
    sample: int
    blob: bytes
    size: int


class Deliveries:
    """Drives a connection until what the caller waits for is there. One thread at a time.

    Attributes:
        inbox: what arrived and was not taken.
        tracks: by request id.
        outstanding: submitted requests that are not complete.
        requested, unique, duplicates, failed: samples; see RolloutClient.delivery.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.inbox: deque[Item | RequestRefused] = deque()
        self.tracks: dict[str, Track] = {}
        self.outstanding = self.requested = self.unique = self.duplicates = self.failed = 0
        self._batches: dict[str, _Batch] = {}
        self._acks: deque[tuple[str, int]] = deque()
        self._acks_out: dict[int, tuple[tuple[str, int], ...]] = {}
        self._cursor = self._held = self._received = self._granted = self._number = self._session = 0
        self._status: tuple[int, Figures] = (0, {})
        self._moved = 0.0
        self._refusal: BlockrollError | None = None

    @property
    def acknowledging(self) -> bool:
        """Whether an acknowledgement is not confirmed yet."""
        return bool(self._acks or self._acks_out)

    def enqueue(self, requests: Sequence[RolloutRequest]) -> str:
        """Takes a batch in, all or nothing; returns its name. Raises RequestError for an id used before."""
        records = {}
        for request in requests:
            record, track = encode_request(request), self.tracks.get(request.id)
            known = records.get(request.id) or (track.record if track is not None else b"")
            if known and known != record:
                raise RequestError("id", f"{request.id!r} was already used with other content", "give each request a new id")
            if track is not None and track.record and track.all_in(track.taken):
                raise RequestError("id", f"{request.id!r} was already answered", "give each request a new id")
            records[request.id] = record
        name, fresh = uuid.uuid4().hex, []
        for request in requests:
            track = self.tracks.setdefault(request.id, Track())
            if not track.record:
                track.record, track.samples, track.batch = records[request.id], request.samples, name
                left = request.samples - len(track.seen)
                self.requested += left
                self.failed += left if track.failed else 0
                if not track.complete:
                    self.outstanding += 1
                    fresh.append(request.id)
        if fresh:
            self._batches[name] = _Batch(fresh, len(fresh))
            self._split(self._batches[name])
        return name

    def recorded(self, name: str) -> bool:
        """Whether the gateway has all of this batch in its ledger."""
        batch = self._batches.get(name)
        return batch is None or batch.recorded == len(batch.parts)

    def drive(self, done: Callable[[], bool], timeout: float | None = None, *, reopen: bool = True) -> None:
        """Exchanges messages until `done()`; opens a new session whenever one is lost, unless `reopen` is False.

        Raises TransportError when the gateway is silent too long or nothing arrives for `timeout` seconds, and what the
        gateway refused.
        """
        self._moved, wait = time.monotonic(), 0.0
        while True:
            try:
                if not self.connection.is_open:
                    if not reopen:
                        return
                    self._open()
                self._exchange(wait)
                if self._refusal is None and done():
                    return
                wait = _WAIT_S if timeout is None else min(_WAIT_S, timeout)
            except SessionLost:
                self.connection.drop()
            if self._refusal is not None:
                error, self._refusal = self._refusal, None
                raise error
            if timeout is not None and time.monotonic() - self._moved > timeout:
                notice = self.connection.notice or "the gateway answers and reports no trouble"
                raise TransportError(f"no trajectory for {timeout:g} s, {self.requested - self.unique - self.failed} samples are "
                                     f"outstanding ({notice}); wait longer, or see status()")

    def take(self) -> Item | RequestRefused:
        """The next of the inbox, its room in the window free again."""
        item = self.inbox.popleft()
        if isinstance(item, RequestRefused):
            return item
        self._held -= item.size
        return replace(item, size=0)

    def hand(self, request_id: str, sample: int) -> None:
        """Counts something as handed to the caller."""
        self._track(request_id).taken.add(sample)
        self.unique += sample != FAILURE

    def tell(self, keys: Sequence[tuple[str, int]]) -> None:
        """Acknowledges with the next exchange."""
        self._acks.extend(keys)

    def status(self) -> Figures:
        """Asks the gateway for its figures."""
        self._number += 1
        number, asked = self._number, -1

        def answered() -> bool:
            nonlocal asked
            if asked != self._session:
                self.connection.send(StatusRequest(number))
                asked = self._session
            return self._status[0] == number

        self.drive(answered)
        return self._status[1]

    def _exchange(self, wait: float) -> None:
        self._flush()
        try:
            for message in self.connection.receive(wait):
                self._handle(message)
        except BaseException:
            # What this session received and nobody handled ends with it; the next one is sent it again.
            self.connection.drop()
            raise
        self._flush()

    def _open(self) -> None:
        for keys in reversed(self._acks_out.values()):
            self._acks.extendleft(reversed(keys))
            for request_id, sample in keys:
                if request_id in self.tracks:
                    self.tracks[request_id].told -= sample != FAILURE
        self._acks_out.clear()
        for batch in self._batches.values():
            self._split(batch)
        self._received, self._granted = 0, max(WINDOW - self._held, 0)
        self._session += 1
        ledger = self.connection.ledger
        self.connection.open(self._granted, self._cursor)
        if self.connection.ledger != ledger:
            self._cursor = 0

    def _split(self, batch: _Batch) -> None:
        """Cuts what is unfinished of a batch into parts that fit a message, none of them sent."""
        batch.parts, batch.told, batch.recorded, size = [], [], 0, _PART_BYTES
        for name in batch.ids:
            track = self.tracks.get(name)
            if track is None or track.complete:
                continue
            if size + len(track.record) > _PART_BYTES or len(batch.parts[-1]) == MAX_PER_SUBMIT:
                batch.parts.append([])
                size = 0
            batch.parts[-1].append(name)
            size += len(track.record)

    def _flush(self) -> None:
        """Sends what may be sent, acknowledgements first: what they free is then known to the gateway."""
        while self._acks and len(self._acks_out) < _ACKS:
            keys = tuple(self._acks.popleft() for _ in range(min(len(self._acks), MAX_ACKS)))
            self._number += 1
            self._acks_out[self._number] = keys
            for request_id, sample in keys:
                if request_id in self.tracks:
                    self.tracks[request_id].told += sample != FAILURE
            self.connection.send(Ack(self._number, keys))
        for name, batch in self._batches.items():
            while len(batch.told) < len(batch.parts) and len(batch.told) - batch.recorded < _SUBMITS:
                index = len(batch.told)
                # Some may have been answered since the parts were cut; the last part must go in any case.
                part = batch.parts[index] = [i for i in batch.parts[index] if i in self.tracks]
                batch.told.append([self.tracks[i].told for i in part])
                self.connection.send(Submit(name, index, index == len(batch.parts) - 1,
                                            tuple(self.tracks[i].record for i in part)))
            if len(batch.told) < len(batch.parts):
                break
        granted = self._received + max(WINDOW - self._held, 0)
        if granted - self._granted >= WINDOW // 8:
            self._granted = granted
            self.connection.send(Credit(granted))

    def _handle(self, message: Message) -> None:
        if isinstance(message, Delivery):
            self._cursor = message.number
            self._delivered(message)
        elif isinstance(message, Failure):
            self._cursor = message.number
            self._received += len(message.error.encode())
            if not self._track(message.request_id).failed:
                self._fail(message.request_id, message.error)
        elif isinstance(message, Submitted):
            self._submitted(message)
        elif isinstance(message, Acked):
            for request_id, sample in self._acks_out.pop(message.number, ()):
                self._confirm(request_id, sample)
        elif isinstance(message, Status):
            self._status = (message.number, dict(message.figures))
        elif isinstance(message, Refused) and message.about in self._batches:
            for request_id in self._batches.pop(message.about).ids:
                track = self.tracks.pop(request_id, None)
                if track is not None and not track.complete:
                    self.outstanding -= 1
                    self.requested -= track.samples - len(track.seen)
            self._refusal = refusal(message)

    def _delivered(self, message: Delivery) -> None:
        size = len(message.blobs[0])
        self._received += size
        self._moved = time.monotonic()
        track = self._track(message.request_id)
        if message.sample in track.seen:
            self.duplicates += 1
            return
        was = track.complete
        track.seen.add(message.sample)
        self.requested += not track.record or bool(track.failed)
        self._held += size
        self.inbox.append(Item(message.request_id, message.sample, bytes(message.blobs[0]), size))
        self._settle(track, was)

    def _submitted(self, message: Submitted) -> None:
        batch = self._batches.get(message.batch)
        if batch is None or message.index != batch.recorded or len(message.acked) != len(batch.parts[message.index]):
            raise TransportError(f"the gateway confirmed part {message.index} of a batch nobody sent it; it is not the one "
                                 "this client submitted to")
        batch.recorded += 1
        why = dict(message.refused)
        for i, request_id in enumerate(batch.parts[message.index]):
            track = self.tracks.get(request_id)
            if track is None:
                continue
            if i in why:
                self._fail(request_id, why[i])
                continue
            elsewhere = max(message.acked[i] - batch.told[message.index][i], track.elsewhere)
            if elsewhere > track.elsewhere:
                was = track.complete
                self.requested -= elsewhere - track.elsewhere
                track.elsewhere = elsewhere
                if elsewhere >= track.samples:
                    self._fail(request_id, "all of it was acknowledged in an earlier life of this client")
                else:
                    self._settle(track, was)
        self._end_batch(message.batch)

    def _fail(self, request_id: str, why: str) -> None:
        track = self._track(request_id)
        was = track.complete
        track.failed = why
        self._moved = time.monotonic()
        self.failed += max(0, track.samples - track.elsewhere - len(track.seen))
        self.inbox.append(RequestRefused(request_id, why))
        self._settle(track, was)

    def _settle(self, track: Track, was_complete: bool) -> None:
        """Books a request that has just become complete."""
        if not track.record or was_complete or not track.complete:
            return
        self.outstanding -= 1
        if track.batch in self._batches:
            self._batches[track.batch].open -= 1
            self._end_batch(track.batch)

    def _end_batch(self, name: str) -> None:
        if name in self._batches and not self._batches[name].open and self.recorded(name):
            del self._batches[name]

    def _confirm(self, request_id: str, sample: int) -> None:
        track = self.tracks.get(request_id)
        if track is not None:
            track.confirmed.add(sample)
            if track.all_in(track.confirmed):
                del self.tracks[request_id]

    def _track(self, request_id: str) -> Track:
        return self.tracks.setdefault(request_id, Track())


def open_item(item: Item) -> Trajectory:
    """The trajectory of an item. Raises TransportError for one that is not what its delivery says."""
    trajectory = decode_trajectory(item.blob)
    if trajectory.key != (item.request_id, item.sample):
        raise TransportError(f"the delivery of {item.request_id!r}, sample {item.sample}, holds {trajectory.key}; "
                             "the gateway's ledger is damaged")
    return trajectory
