"""What dispatch gives, in simulated time: the pool's own dealing, before engines whose steps take a stated time.

An engine here does what `EngineActor.serve` and `Scheduler` do: it takes samples in order of arrival, decodes at most a batch,
gives back what has not begun, and reports at most every 20 ms. Nothing is measured, so other work on the machine changes nothing.
"""

from __future__ import annotations

import heapq
import random
import statistics
from types import SimpleNamespace

import pytest

from blockroll.rollout.backend import Completed
from blockroll.rollout.cluster.actor import _REPORT_S
from blockroll.rollout.cluster.dispatch import Continuous, Dealer, Ordered
from blockroll.rollout.cluster.handle import EngineHandle
from blockroll.rollout.cluster.pool import RayCluster
from blockroll.rollout.cluster.reports import Report
from blockroll.rollout.cluster.spec import EngineSpec
from blockroll.rollout.cluster.work import Backlog
from blockroll.rollout.types import RolloutRequest, SamplingParams, Trajectory

BATCH, ENGINES, MESSAGE_S = 8, 2, 0.0015
LONG, SHORT = 400, 40
STEPS = {
    "accelerator": lambda batch: 10e-3 + 0.05e-3 * batch,  # a step reads the weights, whatever its batch
    "ar": lambda batch: 0.29e-3 + 0.03e-3 * batch,  # tiny-reasoner on one core of a CPU
    "fused": lambda batch: 0.4e-3 + 0.95e-3 * batch,  # the same: 64 rows per sample keep a core busy at any batch
}


class SimulatedEngine:
    """One engine and its handle. `samples` are [order, number, request id, tokens to come]."""

    def __init__(self, simulation, number):
        self.simulation, self.inbox, self.waiting, self.running, self.steps = simulation, [], [], [], False
        self.report, self.reported = Report(), -1.0
        self.handle = EngineHandle(number, EngineSpec("none"), 600.0, 6.0)
        self.handle.phase = "ready"
        self.handle.actor = SimpleNamespace(add=SimpleNamespace(remote=lambda parts: self.tell(self.add, parts)),
                                            give_back=SimpleNamespace(remote=lambda count: self.tell(self.give_back, count)))

    def tell(self, do, given):
        self.simulation.after(MESSAGE_S, lambda: self.hear(do, given))

    def hear(self, do, given):
        self.inbox.append((do, given))
        if not self.steps:
            self.turn()

    def add(self, parts):
        lengths = self.simulation.lengths
        self.waiting += [[part.order, number, part.request.id, lengths[part.request.id]]
                         for part in parts for number in part.numbers]
        self.waiting.sort()

    def give_back(self, count):
        given = [self.waiting.pop() for _ in range(min(count, len(self.waiting)))]
        self.report.returned = (self.report.returned or []) + [(name, number, 1) for _, number, name, _ in given]

    def turn(self):
        """Between two steps."""
        for do, given in self.inbox:
            do(given)
        self.inbox.clear()
        now, works = self.simulation.now, bool(self.running or self.waiting)
        if (self.report.completed or self.report.returned is not None) and (now - self.reported >= _REPORT_S or not works):
            self.report.fresh = len(self.waiting)
            report, self.report, self.reported = self.report, Report(), now
            self.simulation.after(MESSAGE_S, lambda: self.simulation.take(self.handle, report))
        while self.waiting and len(self.running) < BATCH:
            self.running.append(self.waiting.pop(0))
        self.steps = bool(self.running)
        if self.steps:
            self.simulation.after(self.simulation.step_s(len(self.running)), self.end_step)

    def end_step(self):
        for sample in self.running:
            sample[3] -= 1
        for _, number, name, left in self.running:
            if not left:
                nothing = [0.0] * self.simulation.lengths[name]
                trajectory = Trajectory(name, number, (1,), [5] * len(nothing), *[nothing] * 4, "length", 1)
                self.report.completed.append(Completed(1, name, trajectory))
        self.running = [sample for sample in self.running if sample[3]]
        self.turn()


class Simulation:
    """A pool and its engines. Lengths are not known to the pool: every request may have `LONG` tokens."""

    def __init__(self, dispatch, step_s):
        self.now, self.step_s, self.lengths, self.left, self.events, self.count = 0.0, step_s, {}, 0, [], 0
        self.backlog = Backlog()
        self.dealer = Dealer(self.backlog, BATCH)
        self.strategy = Continuous(self.dealer) if dispatch == "continuous" else Ordered(self.dealer, lambda: ENGINES)
        self.handles = [SimulatedEngine(self, number).handle for number in range(ENGINES)]

    def after(self, seconds, do):
        self.count += 1
        heapq.heappush(self.events, (self.now + seconds, self.count, do))

    def take(self, engine, report):
        engine.note(report)
        pool = SimpleNamespace(_backlog=self.backlog, _dealer=self.dealer, _strategy=self.strategy, _early=[], _progress=[],
                               _interruptions=SimpleNamespace(end_unheld=lambda works: None))  # fmt: skip
        RayCluster._take(pool, engine, report)
        self.left -= len(pool._early)
        self.strategy.deal(self.handles)

    def submit(self, lengths):
        requests = [RolloutRequest(f"{len(self.lengths) + i}", (1, 5, 9), SamplingParams(max_tokens=LONG))
                    for i in range(len(lengths))]
        self.lengths.update({request.id: length for request, length in zip(requests, lengths, strict=True)})
        self.left += len(requests)
        self.strategy.submit(self.backlog.add(requests, 1, None))
        self.strategy.deal(self.handles)

    def run(self, until=0):
        """Goes on until so many samples are left; the time."""
        while self.left > until:
            self.now, _, do = heapq.heappop(self.events)
            do()
        return self.now


def seconds(dispatch, steps, batch, ahead, seed):
    """160 samples, of which a tenth, at random places, are ten times longer, in batches.

    Args: ahead: batches that are submitted before the one that is waited for has come; None for all at once.
    """
    lengths = [LONG] * 16 + [SHORT] * 144
    random.Random(seed).shuffle(lengths)
    simulation = Simulation(dispatch, STEPS[steps])
    for first in range(0, len(lengths), batch):
        simulation.submit(lengths[first : first + batch])
        if ahead is not None:
            simulation.run(until=ahead * batch)
    return simulation.run()


def gain(*how):
    """Tokens/s of continuous dispatch in those of ordered, the median of some orders."""
    return statistics.median(seconds("ordered", *how, seed) / seconds("continuous", *how, seed) for seed in range(5))


@pytest.mark.parametrize(("steps", "least"), [("accelerator", 1.25), ("ar", 1.25), ("fused", 1.05)])
@pytest.mark.parametrize(("batch", "ahead"), [(8, None), (40, 1)], ids=["stream", "one batch ahead"])
def test_continuous_gains_where_the_service_is_kept_busy(steps, least, batch, ahead):
    """With steps whose time is that of their rows, no dispatch gains more than the unequal ends of the engines."""
    assert gain(steps, batch, ahead) >= least


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("batch", [20, 160])
def test_continuous_loses_nothing_where_every_batch_is_waited_for(steps, batch):
    assert gain(steps, batch, 0) >= 0.97
