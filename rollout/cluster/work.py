"""The work of a pool: which samples wait, which are with which engine, which have come; and how long samples usually are.

Invariants:
- Every unfinished sample either waits here or is with one engine.
- A sample that has come once is not handed out again.
- Clients take turns: next is the one with the fewest outstanding tokens.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from ..backend import Completed
from ..types import RolloutRequest
from .prefixes import pages_of

PREFILL_COST = 1 / 8
"""What a prompt token costs, in generated tokens: a prompt's rows run together, generated tokens a few per step."""
_LENGTHS, _FIRST_GUESS = 64, 128
"""Completions that say how long samples are, and the guess before there are any."""


@dataclass(eq=False, slots=True)
class Work:
    """One request of a lease.

    Attributes:
        order: number of the request, in the order of arrival.
        waiting: numbers of the samples that are with no engine, in order.
        done: numbers of those that have come.
        pages: of its prompt, see `prefixes`.
        deaths: engines that died with it since its last sample.
        solo_deaths: those of them that served nothing else. alike: the last of these in a row that died at about the same step,
        `died_at`.
        aborted: its samples that are with no engine end without a token.
        watched: engines report its tokens while they are made.
    """

    request: RolloutRequest
    epoch: int
    client: str
    order: int
    waiting: list[int] = field(default_factory=list)
    done: set[int] = field(default_factory=set)
    pages: tuple[int, ...] = ()
    deaths: int = 0
    solo_deaths: int = 0
    alike: int = 0
    died_at: int = 0
    aborted: bool = False
    watched: bool = False

    @property
    def left(self) -> int:
        """Samples that have not come."""
        return self.request.samples - len(self.done)


class Backlog:
    """Everything a pool was given and has not finished.

    Attributes:
        works: by request id.
        waiting: samples that are with no engine.
        outstanding: tokens expected of the samples with engines, by client.
    """

    def __init__(self) -> None:
        self.works: dict[str, Work] = {}
        self.waiting = 0
        self.outstanding: Counter[str] = Counter()
        self._order = 0
        self._queues: dict[str, deque[Work]] = {}
        self._lengths: deque[int] = deque(maxlen=_LENGTHS)

    @property
    def clients(self) -> set[str]:
        """Clients with a waiting sample, or with one at an engine."""
        return {client for client, tokens in self.outstanding.items() if tokens > 0} | self._queues.keys()

    def add(self, batch: Sequence[RolloutRequest], epoch: int, clients: Sequence[str] | None) -> list[Work]:
        """Takes requests in. One that was here under a former lease must have been dropped."""
        works = []
        for request, client in zip(batch, clients or [""] * len(batch), strict=True):
            works.append(Work(request, epoch, client, self._order, pages=pages_of(request.prompt_tokens)))
            self.works[request.id] = works[-1]
            self._order += 1
        return works

    def wait(self, work: Work, numbers: Iterable[int], first: bool = False) -> None:
        """Queues samples that are with no engine: behind the client's works that are as urgent, or before all of them."""
        wanted = [number for number in numbers if number not in work.done]
        if self.works.get(work.request.id) is not work or not wanted:
            return
        if not work.waiting:
            queue = self._queues.setdefault(work.client, deque())
            place = 0 if first else len(queue)
            while place and not first and queue[place - 1].request.priority > work.request.priority:
                place -= 1
            queue.insert(place, work)
        self.waiting += len(wanted)
        work.waiting = sorted(work.waiting + wanted)

    def deal(self, work: Work, count: int) -> list[int]:
        """Takes the first `count` waiting samples of a work; whoever calls gives them to an engine."""
        numbers, work.waiting = work.waiting[:count], work.waiting[count:]
        self.waiting -= len(numbers)
        if numbers and not work.waiting:
            self._leave_queue(work)
        return numbers

    def next(self, passed: Collection[str] = ()) -> Work | None:
        """The work whose turn it is: the first of the client with the fewest outstanding tokens, but for clients passed over."""
        clients = [client for client in self._queues if client not in passed]
        if not clients:
            return None
        return self._queues[min(clients, key=lambda c: (self.outstanding[c], self._queues[c][0].order))][0]

    def take(self, item: Completed) -> Work | None:
        """Notes what an engine handed out; the work it belongs to, or None where it is not wanted."""
        work = self.works.get(item.request_id)
        if work is None or work.epoch != item.epoch:
            return None
        if item.trajectory is not None:
            if item.trajectory.sample in work.done:
                return None
            work.done.add(item.trajectory.sample)
            work.deaths = work.solo_deaths = work.alike = 0
            if item.trajectory.finish_reason != "abort":
                self._lengths.append(len(item.trajectory.tokens))
        if item.trajectory is None or not work.left:
            self.forget(work)
        return work

    def forget(self, work: Work) -> None:
        """The work is over, or dropped."""
        self.deal(work, len(work.waiting))
        if self.works.get(work.request.id) is work:
            del self.works[work.request.id]

    def expected(self, request: RolloutRequest) -> float:
        """Tokens expected of one sample, from the lengths of recent ones."""
        usual = sum(self._lengths) / len(self._lengths) if self._lengths else _FIRST_GUESS
        return min(request.params.max_tokens, max(1.0, usual))

    def _leave_queue(self, work: Work) -> None:
        queue = self._queues[work.client]
        queue.remove(work)
        if not queue:
            del self._queues[work.client]
