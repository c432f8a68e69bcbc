"""Which engine is given which work: `Continuous` and `Ordered`.

Both are asked to `deal` after everything that happened: they take waiting samples from the backlog and give them to engines.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Protocol

from .handle import EngineHandle
from .reports import Part
from .work import Backlog, Work

Samples = Sequence[tuple[Work, Sequence[int]]]
"""Works, and the numbers of their samples."""


class Dealer:
    """Gives samples to engines, many in one call.

    Args:
        max_batch: most samples an engine decodes at once.
    """

    def __init__(self, backlog: Backlog, max_batch: int) -> None:
        self.backlog, self.max_batch = backlog, max_batch
        self._parts: defaultdict[EngineHandle, list[Part]] = defaultdict(list)

    def give(self, engine: EngineHandle, work: Work, count: int) -> None:
        """Takes the first `count` waiting samples of a work for an engine."""
        cost = self.backlog.expected(work.request)
        before = engine.outstanding
        self._parts[engine].append(engine.send(work, self.backlog.deal(work, count), cost))
        self.backlog.outstanding[work.client] += engine.outstanding - before  # type: ignore[assignment]  # tokens, in fractions

    def send(self) -> None:
        """Sends what was given since the last call."""
        for engine, parts in self._parts.items():
            engine.actor.add.remote(parts)
        self._parts.clear()

    def take_back(self, engine: EngineHandle, work: Work, number: int) -> bool:
        """Notes that an engine no longer has a sample; whether it had it."""
        cost = engine.done(work, number)
        left = self.backlog.outstanding[work.client] - cost
        if left > 1e-6:
            self.backlog.outstanding[work.client] = left  # type: ignore[assignment]
        else:
            del self.backlog.outstanding[work.client]
        return cost > 0


class Strategy(Protocol):
    """How work is dealt."""

    def submit(self, works: Sequence[Work]) -> None:
        """Takes a batch."""
        ...

    def again(self, samples: Samples) -> None:
        """Takes the samples that an engine gave back in one report, or had when it died: they come before what has not begun."""
        ...

    def deal(self, engines: Sequence[EngineHandle]) -> None:
        """Gives waiting samples to engines that serve and have room."""
        ...


class Continuous:
    """A request joins an engine between two steps, where the least is outstanding.

    - An engine is given its batch and half as many samples more, so that it never waits for the pool; the rest waits here. What
      was with an engine that died goes to the others at once, to those with places where it fits, else whatever they have.
    - Clients take turns. One that has less than its share of an engine finds room there also when others have filled it.
    - A group goes to one engine, where its prompt is computed once. When everything that waits can begin at once, a group is
      split: each sample goes where the least is outstanding, the prompt counted where it is not known.
    - What a prompt shares with earlier ones of an engine costs nothing there. So the next turn of a conversation goes where the
      last one was, unless so much more is outstanding there that computing the prompt again ends earlier.
    - When nothing waits here, samples that have not begun move from engines that have too many to those that have places.
    """

    def __init__(self, dealer: Dealer) -> None:
        self._dealer, self._backlog = dealer, dealer.backlog
        self._urgent: deque[Work] = deque()
        self._most = dealer.max_batch + max(1, dealer.max_batch // 2)

    def submit(self, works: Sequence[Work]) -> None:
        for work in works:
            self._backlog.wait(work, range(work.request.samples))

    def again(self, samples: Samples) -> None:
        oldest_first = sorted(samples, key=lambda part: part[0].order)
        for work, numbers in reversed(oldest_first):
            self._backlog.wait(work, numbers, first=True)
        self._urgent += [work for work, _ in oldest_first]

    def deal(self, engines: Sequence[EngineHandle]) -> None:
        ready = [engine for engine in engines if engine.serves and not engine.reserved]
        if not ready:
            return
        while self._urgent:
            work = self._urgent.popleft()
            if work.waiting:
                # Not to an engine that `_level` asked for samples: they would go to and fro.
                free = [engine for engine in ready if engine.count < self._dealer.max_batch]
                fits = len(work.waiting) <= sum(self._dealer.max_batch - engine.count for engine in free)
                self._split(work, free if fits else ready, len(work.waiting))
        passed = set[str]()
        while (work_ := self._backlog.next(passed)) is not None:
            if not self._place(work_, ready):
                passed.add(work_.client)
        self._dealer.send()
        if not self._backlog.waiting:
            self._level(ready)

    def _place(self, work: Work, ready: list[EngineHandle]) -> bool:
        """Gives samples of a work to engines that have room for its client; whether there was room."""
        clients = max(1, len(self._backlog.clients))
        share = max(1, self._most // clients)
        room = {engine: self._most - engine.count for engine in ready}
        if clients > 1:
            room = {engine: max(left, share - engine.clients[work.client]) for engine, left in room.items()}
        free = [engine for engine in ready if room[engine] > 0]
        if not free:
            return False
        places = sum(max(0, self._dealer.max_batch - engine.count) for engine in ready)
        if self._backlog.waiting <= places and len(ready) > 1:
            self._split(work, [engine for engine in free if engine.count < self._dealer.max_batch] or free, len(work.waiting))
        else:
            engine = min(free, key=lambda engine: engine.outstanding + engine.prompt_cost(work))
            self._dealer.give(engine, work, max(room[engine], min(self._dealer.max_batch, len(work.waiting))))
        return True

    def _split(self, work: Work, engines: list[EngineHandle], count: int) -> None:
        """Gives each sample to the engine with the least outstanding tokens, in runs of numbers. A prompt that is computed once
        more has to save as much time as it costs."""
        cost = self._backlog.expected(work.request)
        prompt = {engine: engine.prompt_cost(work) for engine in engines}
        load = {engine: engine.outstanding + 2 * prompt[engine] for engine in engines}
        shares = dict.fromkeys(engines, 0)
        for _ in range(count):
            engine = min(load, key=load.__getitem__)
            load[engine] += cost - (0.0 if shares[engine] else prompt[engine])
            shares[engine] += 1
        for engine, share in shares.items():
            if share:
                self._dealer.give(engine, work, share)

    def _level(self, ready: list[EngineHandle]) -> None:
        """Asks the engine with most samples that have not begun for some of them, where another has places."""
        taker = min(ready, key=lambda engine: engine.count)
        giver = max(ready, key=lambda engine: engine.count)
        places, spare = self._dealer.max_batch - taker.count, giver.count - self._dealer.max_batch
        if places > 0:
            giver.ask_back(min(spare, places, max(1, (giver.count - taker.count) // 2)))


class Ordered:
    """A batch is dealt by its order alone: of n engines, share i holds requests i, i + n, i + 2n and so on. An engine serves one
    share at a time, whole, in its order, and takes the next share when it has ended one. So what is computed together does not
    depend on how fast an engine is, and a run repeats with `lossless` and `mixed` too. What was with an engine that died, or was
    given back in one report, is a share of its own, and is next.

    Args:
        wanted: how many engines there should be.
    """

    def __init__(self, dealer: Dealer, wanted: Callable[[], int]) -> None:
        self._dealer, self._backlog, self._wanted = dealer, dealer.backlog, wanted
        self._shares: deque[list[Work]] = deque()

    def submit(self, works: Sequence[Work]) -> None:
        count = max(1, self._wanted())
        for i in range(count):
            if share := list(works[i::count]):
                self._shares.append(share)
                for work in share:
                    self._backlog.wait(work, range(work.request.samples))

    def again(self, samples: Samples) -> None:
        for work, numbers in samples:
            self._backlog.wait(work, numbers)
        if samples:
            self._shares.appendleft(sorted((work for work, _ in samples), key=lambda work: work.order))

    def deal(self, engines: Sequence[EngineHandle]) -> None:
        for engine in engines:
            while engine.serves and not engine.reserved and not engine.count and self._shares:
                for work in self._shares.popleft():
                    if work.waiting:
                        self._dealer.give(engine, work, len(work.waiting))
        self._dealer.send()
