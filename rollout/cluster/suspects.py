"""Requests with which engines died, and whether one of them is to blame.

An engine's death is the machine's fault until the same request has killed engines alone. After `DEATHS` deaths without a sample
in between a request is a suspect: it waits for an engine that serves nothing else, one suspect at a time. Steps repeat: what a
request does to an engine it does again at the same step, while a machine dies at any step. So when `SOLO_DEATHS` engines in a row
have died at the same step while they served it alone, or `MOST_SOLO_DEATHS` at any step, it has failed.

What was decoded before a death is decoded again, since resuming would cost more than it saves. With R requests running for s
seconds each, a death every D seconds loses s/2 seconds of R samples on average, the part s/(2 D) of the work: 0.1 % for samples
of 20 s and a death every 3 hours. To resume, every engine would have to stream tokens, log-probabilities and traces at every
step: a report costs about 1 ms of an engine's thread, 5 % of steps of 20 ms.
"""

from __future__ import annotations

from collections.abc import Sequence

from .dispatch import Dealer
from .handle import EngineHandle
from .work import Backlog, Work

DEATHS, SOLO_DEATHS, MOST_SOLO_DEATHS = 5, 3, 12
"""Deaths in company before a request is tried alone, and alone before it has failed, at the same step or at any. Who is tried
alone waits for an engine: where a machine kills one engine of two every 6 s, a request that takes 2 s meets 3 deaths in 1 case of
30 that meet any, and 5 in 1 of 600."""
_SAME = 3
"""Steps that lie this close are the same one: the reports of the last ones may die with the engine."""


class Suspects:
    """Works that have to be alone on an engine."""

    def __init__(self, dealer: Dealer) -> None:
        self._dealer = dealer
        self._backlog: Backlog = dealer.backlog
        self._waiting: dict[Work, set[int]] = {}
        self._alone: Work | None = None
        self._engine: EngineHandle | None = None

    def note_death(self, engine: EngineHandle) -> tuple[list[tuple[Work, list[int]]], list[Work]]:
        """An engine died with `engine.samples`. Returns the works that go on as before, with the numbers it had, and those that
        have failed."""
        go_on, failed = [], []
        for work, known in list(engine.samples.items()):
            numbers = list(known)
            for number in numbers:
                self._dealer.take_back(engine, work, number)
            if self._backlog.works.get(work.request.id) is not work:
                continue
            if engine is self._engine and work is self._alone:
                self._note_solo_death(work, engine.steps)
                if work.alike >= SOLO_DEATHS or work.solo_deaths >= MOST_SOLO_DEATHS:
                    failed.append(work)
                    continue
            else:
                work.deaths += 1
            if work.deaths >= DEATHS or work in self._waiting:
                self._waiting.setdefault(work, set()).update(numbers)
            else:
                go_on.append((work, numbers))
        if engine is self._engine:
            self._end()
        return go_on, failed

    def deal(self, engines: Sequence[EngineHandle]) -> None:
        """Gives the next suspect to an engine that has nothing else; reserves one where there is none."""
        works = self._backlog.works
        if self._alone is not None and works.get(self._alone.request.id) is not self._alone:
            self._end()
        self._waiting = {work: left for work, numbers in self._waiting.items()
                         if works.get(work.request.id) is work and (left := numbers - work.done)}  # what was aborted has come
        able = [engine for engine in engines if not engine.waits and not engine.draining]
        if self._engine is not None and not _others_serve(able, self._engine):
            self._end()
            return
        if self._alone is not None:
            return
        if not self._waiting:
            self._end()
            return
        if self._engine is None or self._engine.draining or self._engine.phase == "lost":
            self._end()
            able = [engine for engine in able if engine.phase != "lost"]
            chosen = min(able, key=lambda engine: (engine.waits, engine.count), default=None)
            if chosen is None or not _others_serve(engines, chosen):
                return
            self._engine = chosen
            self._engine.reserved = True
            if len(able) > 1:
                self._engine.ask_back(self._engine.count)
        if self._engine.serves and not self._engine.count:
            self._alone = max(self._waiting, key=lambda work: work.solo_deaths)
            numbers = self._waiting.pop(self._alone)
            self._backlog.wait(self._alone, numbers)
            self._engine.steps = 0  # those of the suspect before it
            self._dealer.give(self._engine, self._alone, len(self._alone.waiting))
            self._dealer.send()

    @staticmethod
    def _note_solo_death(work: Work, step: int) -> None:
        same = work.solo_deaths > 0 and abs(step - work.died_at) <= _SAME
        work.alike, work.died_at = work.alike + 1 if same else 1, step
        work.solo_deaths += 1

    def _end(self) -> None:
        if self._engine is not None:
            self._engine.reserved = False
        self._alone = self._engine = None


def _others_serve(engines: Sequence[EngineHandle], alone: EngineHandle) -> bool:
    """Whether the others' work, which comes first, has an engine when `alone` serves a suspect. Where there is one engine, both
    take turns."""
    able = [engine for engine in engines if not engine.waits and not engine.draining]
    return len(able) <= 1 or any(engine.serves and engine is not alone for engine in able)
