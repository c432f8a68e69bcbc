"""All requests of a client that are not wholly acknowledged, what arrived of them, and how many samples there are. No
sockets here.

Invariants:
- Every (request id, sample) enters the inbox once in a client's life, however often it arrives.
- requested = unique + failed + missing at any time; `unique` counts the samples that were handed to the caller.
- A request is forgotten when it is ACKNOWLEDGED (see `pending_request`).
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from ...errors import RequestError, TransportError
from ...rollout.types import RolloutRequest, Trajectory
from ..wire.limits import MAX_PER_SUBMIT
from ..wire.messages import Submit, Submitted
from ..wire.records import FAILURE, decode_trajectory, encode_request
from .connection import RequestRefused
from .pending_request import PendingRequest, State, Submission

PART_BYTES = 4 << 20
"""Bytes of request records in one message, unless a single record is larger."""
MAX_UNCONFIRMED_PARTS = 16
"""Parts of a batch that may be sent before the gateway has confirmed them. The gateway records what has come of them with
one write to disk."""


@dataclass(slots=True)
class Batch:
    """Requests submitted in one call, and how much of them was sent in this session.

    Attributes:
        ids: the requests that were not complete when they were submitted.
        outstanding: how many of them are.
        parts: ids of each message the batch is sent in.
        acks_sent: per part that was sent, `acks_sent` of each of its requests at that time.
        recorded: parts that the gateway has confirmed.
    """

    ids: list[str]
    outstanding: int
    parts: list[list[str]] = field(default_factory=list)
    acks_sent: list[list[int]] = field(default_factory=list)
    recorded: int = 0


@dataclass(frozen=True, slots=True)
class Arrival:
    """A trajectory that arrived and was not handed out. `size`: the bytes it takes of the credit window."""

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


class PendingRequests:
    """What one client knows of its requests.

    Attributes:
        inbox: what arrived and was not taken; `inbox_bytes` is what it takes of the credit window.
        requests, batches: by request id, by batch name.
        claims: by request id, where its answers go instead of the inbox.
        cancelled: ids of requests that the caller has cancelled and that are not acknowledged.
        outstanding: submitted requests for which samples or a failure are to come.
        requested, unique, duplicates, failed: samples; see RolloutClient.delivery.
    """

    def __init__(self) -> None:
        self.inbox: deque[Arrival | RequestRefused] = deque()
        self.requests: dict[str, PendingRequest] = {}
        self.batches: dict[str, Batch] = {}
        self.claims: dict[str, deque[Arrival | RequestRefused]] = {}
        self.cancelled: set[str] = set()
        self._unsent: dict[str, Batch] = {}
        self.inbox_bytes = self.outstanding = self.requested = self.unique = self.duplicates = self.failed = 0

    @property
    def submitting(self) -> bool:
        """Whether parts of batches are to be sent."""
        return bool(self._unsent)

    @property
    def missing(self) -> int:
        """Samples that neither were handed to the caller nor failed."""
        return self.requested - self.unique - self.failed

    def submit(self, requests: Sequence[RolloutRequest]) -> str:
        """Takes a batch in, all or nothing; returns its name. Raises RequestError for an id used before."""
        records: dict[str, bytes] = {}
        for request in requests:
            record, pending = encode_request(request), self.requests.get(request.id)
            submission = None if pending is None else pending.submission
            known = records.get(request.id) or (submission.record if submission is not None else record)
            if known != record:
                raise RequestError("id", f"{request.id!r} was already used with other content",
                                   "give each request a new id")
            if pending is not None and submission is not None and pending.answered:
                raise RequestError("id", f"{request.id!r} was already answered", "give each request a new id")
            records[request.id] = record
        name, fresh = uuid.uuid4().hex, []
        for request in requests:
            pending = self._request(request.id)
            if pending.submission is None:
                pending.submit(Submission(records[request.id], request.samples, name))
                self.requested += pending.missing
                self.failed += pending.missing if pending.state is State.FAILED else 0
                if pending.outstanding:
                    fresh.append(request.id)
        if fresh:
            self.outstanding += len(fresh)
            self.batches[name] = Batch(fresh, len(fresh))
            self._cut(name, self.batches[name])
        return name

    def recorded(self, name: str) -> bool:
        """Whether the gateway has all of this batch in its ledger."""
        batch = self.batches.get(name)
        return batch is None or batch.recorded == len(batch.parts)

    def unconfirmed(self, request_id: str) -> bool:
        """Whether the request is submitted and the gateway has not confirmed its batch yet."""
        pending = self.requests.get(request_id)
        return pending is not None and pending.submission is not None and not self.recorded(pending.submission.batch)

    def complete(self, request_ids: Iterable[str]) -> bool:
        """Whether nothing more will arrive of any of these requests."""
        return not any(self.requests[request_id].outstanding for request_id in request_ids)

    def restart(self) -> None:
        """A new session begins: the unfinished requests of every batch are cut into parts again, none of which is
        sent."""
        self._unsent.clear()
        for name, batch in self.batches.items():
            self._cut(name, batch)

    def parts(self) -> Iterator[Submit]:
        """The parts of batches that may be sent now, in order. Each counts as sent once it is taken from here."""
        for name, batch in list(self._unsent.items()):
            while (index := len(batch.acks_sent)) < min(len(batch.parts), batch.recorded + MAX_UNCONFIRMED_PARTS):
                # Some may have been answered since the part was cut.
                ids = batch.parts[index] = [i for i in batch.parts[index]
                                            if i in self.requests and self.requests[i].submission is not None]
                batch.acks_sent.append([self.requests[i].acks_sent for i in ids])
                records = tuple(self._record(i) for i in ids)
                yield Submit(name, index, index == len(batch.parts) - 1, records)
            if len(batch.acks_sent) < len(batch.parts):
                return
            self._unsent.pop(name, None)

    def receipt(self, message: Submitted) -> None:
        """The gateway has recorded a part."""
        batch = self.batches.get(message.batch)
        if batch is None or message.index != batch.recorded or len(message.acked) != len(batch.parts[message.index]):
            raise TransportError(f"the gateway confirmed part {message.index} of a batch nobody sent it; "
                                 "it is not the one this client submitted to")
        batch.recorded += 1
        why = dict(message.refused)
        for place, request_id in enumerate(batch.parts[message.index]):
            pending = self.requests.get(request_id)
            if pending is None:
                continue
            if place in why:
                self.fail(request_id, why[place])
                continue
            was_outstanding, was_failed = pending.outstanding, pending.state is State.FAILED
            more = pending.receipt(message.acked[place] - batch.acks_sent[message.index][place])
            self.requested -= more
            self.failed -= more if was_failed else 0
            if more and pending.submission is not None and pending.acknowledged_before >= pending.submission.samples:
                self.fail(request_id, "all of it was acknowledged in an earlier life of this client")
            self._settle(pending, was_outstanding)
        self._close(message.batch)

    def deliver(self, request_id: str, sample: int, blob: bytes) -> None:
        """A trajectory arrived, perhaps again."""
        pending = self._request(request_id)
        was_outstanding, failed = pending.outstanding, pending.state is State.FAILED
        if not pending.arrive(sample):
            self.duplicates += 1
            return
        # Samples nobody counts on were not counted as requested: those of another life, and those that were to fail.
        self.requested += pending.submission is None or failed
        # The window counts what nobody takes. A caller that waits for other requests takes what comes before them.
        size = len(blob) if not self.claims else 0
        self.inbox_bytes += size
        self.claims.get(request_id, self.inbox).append(Arrival(request_id, sample, blob, size))
        self._settle(pending, was_outstanding)

    def fail(self, request_id: str, why: str) -> None:
        """The missing samples of a request will not come."""
        pending = self._request(request_id)
        was_outstanding = pending.outstanding
        if pending.fail():
            self.failed += max(0, pending.missing)
            self.claims.get(request_id, self.inbox).append(RequestRefused(request_id, why))
            self._settle(pending, was_outstanding)

    def abandon(self, name: str) -> None:
        """The gateway refused a batch: everything is as if the batch had not been submitted."""
        self._unsent.pop(name, None)
        for request_id in self.batches.pop(name).ids:
            pending = self.requests.pop(request_id, None)
            if pending is not None and pending.outstanding:
                self.outstanding -= 1
                self.requested -= pending.missing

    def take(self) -> Arrival | RequestRefused:
        """Removes the first item of the inbox and frees its room in the window."""
        item = self.inbox.popleft()
        if isinstance(item, RequestRefused):
            return item
        self.inbox_bytes -= item.size
        return replace(item, size=0)

    def take_back(self, item: Arrival) -> None:
        """An item that was handed out was not, after all: it is the first of the inbox again."""
        self._request(item.request_id).take_back(item.sample)
        self.unique -= 1
        self.put_back([item])

    def claim(self, request_ids: Iterable[str], items: deque[Arrival | RequestRefused]) -> None:
        """Answers of these requests go to `items` until `unclaim`. Those in the inbox go there now."""
        for request_id in request_ids:
            if request_id in self.claims:
                raise RequestError("id", f"{request_id!r} is being collected by another call", "collect each request once")
        self.claims.update(dict.fromkeys(request_ids, items))
        self.free_window()
        for item in [self.inbox.popleft() for _ in range(len(self.inbox))]:
            self.claims.get(item.request_id, self.inbox).append(item)

    def unclaim(self, request_ids: Iterable[str]) -> None:
        """Ends `claim`."""
        for request_id in request_ids:
            del self.claims[request_id]

    def free_window(self) -> None:
        """What is in the inbox takes nothing of the credit window any more."""
        if self.inbox_bytes:
            self.inbox_bytes = 0
            self.inbox = deque(replace(item, size=0) if isinstance(item, Arrival) else item for item in self.inbox)

    def put_back(self, items: Sequence[Arrival | RequestRefused]) -> None:
        """Puts items that were taken in front of the inbox, in their order."""
        self.inbox.extendleft(reversed(items))

    def forget(self, request_ids: set[str]) -> None:
        """Removes from the inbox what arrived of these requests, all of which is acknowledged."""
        if request_ids:
            for item in [self.inbox.popleft() for _ in range(len(self.inbox))]:
                if item.request_id not in request_ids:
                    self.inbox.append(item)
                elif isinstance(item, Arrival):
                    self.inbox_bytes -= item.size
                    self.requested -= 1

    def hand_out(self, request_id: str, sample: int) -> None:
        """A sample, or the failure, is given to the caller."""
        self._request(request_id).hand_out(sample)
        self.unique += sample != FAILURE

    def count_acks(self, keys: Iterable[tuple[str, int]], by: int) -> None:
        """Acknowledgements of these were sent (`by` = 1), or count as not sent since their session ended (-1)."""
        for request_id, sample in keys:
            if request_id in self.requests and sample != FAILURE:
                self.requests[request_id].acks_sent += by

    def confirm(self, keys: Iterable[tuple[str, int]]) -> None:
        """The gateway has recorded the acknowledgements of these."""
        for request_id, sample in keys:
            pending = self.requests.get(request_id)
            if pending is not None:
                pending.confirm(sample)
                if pending.state is State.ACKNOWLEDGED:
                    del self.requests[request_id]
                    self.cancelled.discard(request_id)

    def _cut(self, name: str, batch: Batch) -> None:
        """Shares the outstanding requests of a batch among messages of at most PART_BYTES and MAX_PER_SUBMIT
        requests."""
        batch.parts, batch.acks_sent, batch.recorded, size = [], [], 0, PART_BYTES
        self._unsent[name] = batch
        for request_id in batch.ids:
            pending = self.requests.get(request_id)
            if pending is None or not pending.outstanding:
                continue
            pending.restart()
            length = len(self._record(request_id))
            if size + length > PART_BYTES or len(batch.parts[-1]) == MAX_PER_SUBMIT:
                batch.parts.append([])
                size = 0
            batch.parts[-1].append(request_id)
            size += length

    def _settle(self, pending: PendingRequest, was_outstanding: bool) -> None:
        """Counts a request that has ceased to be outstanding."""
        if pending.submission is not None and was_outstanding and not pending.outstanding:
            self.outstanding -= 1
            if pending.submission.batch in self.batches:
                self.batches[pending.submission.batch].outstanding -= 1
                self._close(pending.submission.batch)

    def _close(self, name: str) -> None:
        if name in self.batches and not self.batches[name].outstanding and self.recorded(name):
            del self.batches[name]
            self._unsent.pop(name, None)

    def _record(self, request_id: str) -> bytes:
        submission = self.requests[request_id].submission
        assert submission is not None, "only submitted requests are in a batch"
        return submission.record

    def _request(self, request_id: str) -> PendingRequest:
        return self.requests.setdefault(request_id, PendingRequest())
