"""A client's books: which samples it asked for, which arrived, were handed out, acknowledged. No sockets here.

Invariants:
- Every (request id, sample) enters the inbox once in a client's life, whatever arrives again.
- requested = unique + failed + missing at any time; `unique` counts what was handed to the caller.
- A request id is forgotten when all of it is answered, acknowledged and confirmed: no gateway sends it again.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from ..errors import RequestError, TransportError
from ..rollout.types import RolloutRequest, Trajectory
from .connection import RequestRefused
from .messages import MAX_PER_SUBMIT, Submitted
from .records import FAILURE, decode_trajectory, encode_request

PART_BYTES = 4 << 20
"""Bytes of request records in one message, unless a single record is larger."""


@dataclass(slots=True)
class Track:
    """One request id: samples `seen` arrived, `taken` were handed out, `confirmed` are recorded as acknowledged.

    `samples` is 0 and `record` empty until it is submitted in this life; `told` counts acknowledgements sent,
    `elsewhere` samples acknowledged in an earlier life.
    """

    record: bytes = b""
    samples: int = 0
    batch: str = ""
    failed: str = ""
    elsewhere: int = 0
    told: int = 0
    seen: set[int] = field(default_factory=set)
    taken: set[int] = field(default_factory=set)
    confirmed: set[int] = field(default_factory=set)

    @property
    def complete(self) -> bool:
        """Nothing more of it will arrive."""
        return bool(self.failed) or self.left <= 0

    @property
    def left(self) -> int:
        """Samples that have not arrived in this life or an earlier one."""
        return self.samples - self.elsewhere - len(self.seen)

    def all_in(self, done: set[int]) -> bool:
        """It is complete, and what arrived, or its failure, is in `done`."""
        return self.complete and self.seen <= done and (not self.failed or FAILURE in done)


@dataclass(slots=True)
class Batch:
    """Requests submitted in one call and how far their parts have come in this session; `open` are not complete."""

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

    def open(self) -> Trajectory:
        """The trajectory. Raises TransportError for one that is not what its delivery says."""
        trajectory = decode_trajectory(self.blob)
        if trajectory.key != (self.request_id, self.sample):
            raise TransportError(f"the delivery of {self.request_id!r}, sample {self.sample}, holds {trajectory.key}; "
                                 "the gateway's ledger is damaged")
        return trajectory


class Book:
    """What one client knows of its requests.

    Attributes:
        inbox: what arrived and was not taken; `held` is its size in the window, bytes.
        tracks, batches: by request id, by batch name.
        outstanding: submitted requests that are not complete.
        requested, unique, duplicates, failed: samples; see RolloutClient.delivery.
    """

    def __init__(self) -> None:
        self.inbox: deque[Item | RequestRefused] = deque()
        self.tracks: dict[str, Track] = {}
        self.batches: dict[str, Batch] = {}
        self.held = self.outstanding = self.requested = self.unique = self.duplicates = self.failed = 0

    def enqueue(self, requests: Sequence[RolloutRequest]) -> str:
        """Takes a batch in, all or nothing; returns its name. Raises RequestError for an id used before."""
        records: dict[str, bytes] = {}
        for request in requests:
            record, track = encode_request(request), self.tracks.get(request.id)
            known = records.get(request.id) or (track.record if track is not None else b"")
            if known and known != record:
                raise RequestError("id", f"{request.id!r} was already used with other content",
                                   "give each request a new id")
            if track is not None and track.record and track.all_in(track.taken):
                raise RequestError("id", f"{request.id!r} was already answered", "give each request a new id")
            records[request.id] = record
        name, fresh = uuid.uuid4().hex, []
        for request in requests:
            track = self._track(request.id)
            if not track.record:
                track.record, track.samples, track.batch = records[request.id], request.samples, name
                self.requested += track.left
                self.failed += track.left if track.failed else 0
                if not track.complete:
                    fresh.append(request.id)
        if fresh:
            self.outstanding += len(fresh)
            self.batches[name] = Batch(fresh, len(fresh))
            self._cut(self.batches[name])
        return name

    def recorded(self, name: str) -> bool:
        """Whether the gateway has all of this batch in its ledger."""
        batch = self.batches.get(name)
        return batch is None or batch.recorded == len(batch.parts)

    def restart(self) -> None:
        """A new session begins: what is unfinished of every batch is cut into parts again, none of them sent."""
        for batch in self.batches.values():
            self._cut(batch)

    def part(self, batch: Batch) -> tuple[bytes, ...]:
        """Records of the next part to send. Some may have been answered since it was cut."""
        index = len(batch.told)
        batch.parts[index] = [i for i in batch.parts[index] if i in self.tracks]
        batch.told.append([self.tracks[i].told for i in batch.parts[index]])
        return tuple(self.tracks[i].record for i in batch.parts[index])

    def submitted(self, message: Submitted) -> None:
        """The gateway has recorded a part."""
        batch = self.batches.get(message.batch)
        if batch is None or message.index != batch.recorded or len(message.acked) != len(batch.parts[message.index]):
            raise TransportError(f"the gateway confirmed part {message.index} of a batch nobody sent it; "
                                 "it is not the one this client submitted to")
        batch.recorded += 1
        why = dict(message.refused)
        for i, request_id in enumerate(batch.parts[message.index]):
            track = self.tracks.get(request_id)
            if track is None:
                continue
            elsewhere = message.acked[i] - batch.told[message.index][i]
            if i in why:
                self.fail(request_id, why[i])
            elif elsewhere > track.elsewhere:
                was = track.complete
                self.requested -= elsewhere - track.elsewhere
                track.elsewhere = elsewhere
                if elsewhere >= track.samples:
                    self.fail(request_id, "all of it was acknowledged in an earlier life of this client")
                self._settle(track, was)
        self._close(message.batch)

    def deliver(self, request_id: str, sample: int, blob: bytes) -> None:
        """A trajectory arrived, perhaps again."""
        track = self._track(request_id)
        if sample in track.seen:
            self.duplicates += 1
            return
        was = track.complete
        self.requested += not track.record or bool(track.failed)
        track.seen.add(sample)
        self.held += len(blob)
        self.inbox.append(Item(request_id, sample, blob, len(blob)))
        self._settle(track, was)

    def fail(self, request_id: str, why: str) -> None:
        """The rest of a request will not come."""
        track = self._track(request_id)
        if track.failed:
            return
        was = track.complete
        self.failed += max(0, track.left)
        track.failed = why
        self.inbox.append(RequestRefused(request_id, why))
        self._settle(track, was)

    def abandon(self, name: str) -> None:
        """The gateway did not take a batch: as if it had not been submitted."""
        for request_id in self.batches.pop(name).ids:
            track = self.tracks.pop(request_id, None)
            if track is not None and not track.complete:
                self.outstanding -= 1
                self.requested -= track.left

    def take(self) -> Item | RequestRefused:
        """The next of the inbox, its room in the window free again."""
        item = self.inbox.popleft()
        if isinstance(item, RequestRefused):
            return item
        self.held -= item.size
        return replace(item, size=0)

    def forget(self, request_ids: set[str]) -> None:
        """Drops what arrived of these requests, all of which is acknowledged, and was not taken."""
        if request_ids:
            for item in [self.inbox.popleft() for _ in range(len(self.inbox))]:
                if item.request_id not in request_ids:
                    self.inbox.append(item)
                elif isinstance(item, Item):
                    self.held -= item.size
                    self.requested -= 1

    def hand(self, request_id: str, sample: int) -> None:
        """Counts something as handed to the caller."""
        self._track(request_id).taken.add(sample)
        self.unique += sample != FAILURE

    def tell(self, keys: Iterable[tuple[str, int]], by: int = 1) -> None:
        """Acknowledgements of these were sent, or (by=-1) are to be sent again."""
        for request_id, sample in keys:
            if request_id in self.tracks and sample != FAILURE:
                self.tracks[request_id].told += by

    def confirm(self, keys: Iterable[tuple[str, int]]) -> None:
        """These acknowledgements are recorded."""
        for request_id, sample in keys:
            track = self.tracks.get(request_id)
            if track is not None:
                track.confirmed.add(sample)
                if track.all_in(track.confirmed):
                    del self.tracks[request_id]

    def _cut(self, batch: Batch) -> None:
        batch.parts, batch.told, batch.recorded, size = [], [], 0, PART_BYTES
        for name in batch.ids:
            track = self.tracks.get(name)
            if track is None or track.complete:
                continue
            if size + len(track.record) > PART_BYTES or len(batch.parts[-1]) == MAX_PER_SUBMIT:
                batch.parts.append([])
                size = 0
            batch.parts[-1].append(name)
            size += len(track.record)

    def _settle(self, track: Track, was_complete: bool) -> None:
        """Books a request that has just become complete."""
        if track.record and track.complete and not was_complete:
            self.outstanding -= 1
            if track.batch in self.batches:
                self.batches[track.batch].open -= 1
                self._close(track.batch)

    def _close(self, name: str) -> None:
        if name in self.batches and not self.batches[name].open and self.recorded(name):
            del self.batches[name]

    def _track(self, request_id: str) -> Track:
        return self.tracks.setdefault(request_id, Track())
