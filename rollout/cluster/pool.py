"""A pool of engines on Ray that implements `RolloutBackend`.

Invariants:
- Samples come back one by one, each once, under the epoch they were submitted under.
- A dead or hung engine is given up: what it had goes to the others at once (`dispatch`), and its next process starts in the
  background, from the pool's weight version.
- Everything happens in the thread that calls, within `poll` or another method. `scale` and `engines` may be called from any
  thread.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayTaskError

from ...errors import ClusterError
from ..backend import IN_FLIGHT_POLICIES, Completed, Dispatch, InFlightPolicy, Progress
from ..types import RolloutRequest
from .dispatch import Continuous, Dealer, Ordered, Strategy
from .fleet import LOOK_S, Fleet
from .handle import EngineHandle, EngineLost
from .interruptions import Interruptions
from .ray_errors import one_line
from .ray_start import start_ray
from .reports import Report
from .spec import EngineSpec, EngineStatus
from .suspects import Suspects
from .transports import transport_of
from .weight_commit import WeightCommit
from .weight_transport import Transport
from .work import Backlog, Work

_log = logging.getLogger(__package__)
ANSWER_S = 600.0
"""Seconds an engine may take to load, or to take, a weight version, and for one step."""
HEARTBEAT_S = 6.0
"""Seconds an engine may be silent. The thread that answers for it needs a moment of a core only, whatever the engine does."""


class RayCluster:
    """Engines of one policy. The constructor returns when every engine for which Ray has a place has loaded the policy.

    Args:
        spec: what each engine is started with.
        engines: how many there should be.
        dispatch: how work is dealt; see `rollout.cluster.dispatch`.
        address: Ray address; None starts a Ray of its own on this machine.
        answer_seconds: how long an engine may take to load, or to take, a weight version, and for one step.
        heartbeat_seconds: how long an engine may be silent before it is replaced.
        max_engines: most engines `scale` will ask for, by which a Ray of its own is sized; None for `engines`.
        weight_transport: how weight versions come into the engines; see `rollout.cluster.weight_transport`.
        owns_ray: the Ray that this process is connected to serves this pool alone, which shuts it down.

    Attributes:
        version: the weight version that serves.
        restarts: engine processes that were replaced so far.
        watched: ids of requests whose tokens are reported while they are made; any thread may change it.

    Raises:
        ClusterError: there is no Ray, or an engine cannot be started.
    """

    in_flight_policies = IN_FLIGHT_POLICIES
    takes_changes = True

    def __init__(
        self,
        spec: EngineSpec,
        *,
        engines: int = 2,
        dispatch: Dispatch = "continuous",
        address: str | None = None,
        answer_seconds: float = ANSWER_S,
        heartbeat_seconds: float = HEARTBEAT_S,
        max_engines: int | None = None,
        weight_transport: Transport = "ray",
        owns_ray: bool = False,
    ) -> None:
        if dispatch not in ("continuous", "ordered"):
            raise ClusterError(f"dispatch: unknown value {dispatch!r}; use continuous or ordered")
        if engines < 1:
            raise ClusterError(f"engines: {engines} is less than 1; use at least one")
        self.dispatch, self.version = dispatch, 0
        self._answer_s = answer_seconds
        self._restarts = 0
        self._transport = transport_of(weight_transport, answer_seconds)
        self._committing = False
        self._early: list[Completed] = []
        self.watched: set[str] = set()
        self._progress: list[Progress] = []
        self._fleet = Fleet(spec, engines, answer_seconds, heartbeat_seconds)
        self._engines = self._fleet.engines
        self._expected: Mapping[str, tuple[str, tuple[int, ...]]] = {}
        self._backlog = Backlog()
        self._dealer = Dealer(self._backlog, spec.config.max_batch)
        self._suspects = Suspects(self._dealer)
        self._interruptions = Interruptions(
            self._engines, self._backlog, self._pump, self._lose, lambda item: self._early.append(item))
        ordered = Ordered(self._dealer, lambda: self._fleet.wanted)
        self._strategy: Strategy = ordered if dispatch == "ordered" else Continuous(self._dealer)
        self._looked = self._read_at = time.monotonic()
        self._own_ray = owns_ray or start_ray(address, math.ceil(max(engines, max_engines or 0) * spec.num_cpus))
        try:
            self._wait_until_loaded()
        except BaseException:
            self.close()
            raise

    @property
    def restarts(self) -> int:
        """Engine processes that were replaced so far."""
        return self._restarts

    def submit(self, batch: Sequence[RolloutRequest], epoch: int, clients: Sequence[str] | None = None) -> None:
        """Takes a batch; `clients` says whose each request is. A request that is here under a lower epoch is dropped."""
        self.cancel([request.id for request in batch if request.id in self._backlog.works])
        works = self._backlog.add(batch, epoch, clients)
        for work in works:
            work.watched = work.request.id in self.watched
        self._strategy.submit(works)
        self._deal()

    def poll(self, timeout: float) -> list[Completed]:
        """Finished samples; waits up to `timeout` seconds for the first."""
        if not self._early:
            self._pump(timeout)
        done, self._early = self._early, []
        return done

    def take_progress(self) -> list[Progress]:
        """What watched samples have made; see `Progress`."""
        progress, self._progress = self._progress, []
        return progress

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Drops the unfinished samples of these requests. Nothing more comes of them."""
        self._early = [item for item in self._early if item.request_id not in request_ids]
        self._drop([self._backlog.works[name] for name in dict.fromkeys(request_ids) if name in self._backlog.works])

    def abort(self, request_ids: Collection[str] | None = None) -> None:
        """See `InterruptibleBackend.abort`."""
        self._interruptions.abort(request_ids)

    def hold(self, held: bool) -> None:
        """See `InterruptibleBackend.hold`."""
        self._interruptions.hold(held)
        self._deal()

    def reset_prefix_cache(self) -> None:
        """See `InterruptibleBackend.reset_prefix_cache`."""
        self._interruptions.each("reset_prefix_cache")

    def label_version(self, version: int) -> None:
        """See `InterruptibleBackend.label_version`."""
        self._interruptions.label(version)
        self.version = version

    def revoke(self, epoch: int) -> None:
        """Drops the work of a lease that is over, and gives up the engines that hang over it."""
        works = [work for work in self._backlog.works.values() if work.epoch == epoch]
        hung = [engine for engine in self._engines if engine.hangs(time.monotonic()) and
                any(work.epoch == epoch for work in engine.samples)]
        self._drop(works)
        for engine in hung:
            self._lose(engine, f"it made no step and lease {epoch} is over")
        self._deal()

    def commit_weights(
        self, version: int, arrays: Mapping[str, np.ndarray], in_flight: InFlightPolicy = "finish",
        changed: Collection[str] | None = None,
    ) -> None:
        """Stages the version on every engine, then has every engine take it. ClusterError leaves the old version serving.

        Args:
            in_flight: `finish` waits for every sample first; `keep` goes on with the old keys and values; `recompute`
                prefills unfinished samples again under the new weights; `abort` ends those that have a generated token.
                Samples without one are prefilled under the new weights.
            changed: the names of the tensors that are not those which serve; None for all. Only they travel.
        """
        if in_flight not in IN_FLIGHT_POLICIES:
            raise ClusterError(f"in_flight: unknown policy {in_flight!r}; use one of {', '.join(IN_FLIGHT_POLICIES)}")
        while in_flight == "finish" and self._backlog.works:
            self._pump(1.0)
        end = time.monotonic() + self._answer_s
        while not (ready := [engine for engine in self._engines if engine.phase == "ready"]):
            if time.monotonic() > end:
                raise ClusterError(f"weights: no engine serves, so none could take version {version}; push it again later")
            self._pump(0.2)
        commit = WeightCommit(self._transport, self._pump, self._lose, self._answer_s)
        if changed is not None and not self._transport.serves:
            changed = None
        self._committing = True
        try:
            staged = commit.stage(ready, version, arrays, changed)
            errors = commit.take(staged, version, in_flight)
            taken = not all(isinstance(error, RayTaskError) for error in errors.values())
            self._transport.settle(taken)
            if taken:
                self.version = version
            for engine, error in errors.items():
                if error is None and engine.phase == "ready":  # else it has died since, and its next process takes the version
                    engine.note_version(version)
                elif engine.phase == "ready":
                    # It may have taken part of the version. Its next process starts from what the pool serves.
                    self._lose(engine, f"it did not take weight version {version}: {one_line(error)}")
        except ClusterError:
            self._transport.settle(False)
            raise
        finally:
            self._committing = False
        if not taken:
            why = one_line(next(error for error in errors.values() if error is not None))
            raise ClusterError(f"weights: no engine could take version {version} ({why}); the old one serves")
        _log.info("weight version %d serves on %d engines", version, len(staged))

    def room_for_weights(self, forms: Mapping[str, tuple[str, tuple[int, ...]]]) -> Mapping[str, np.ndarray] | None:
        """Arrays of these dtypes and shapes from which `commit_weights` need not copy; None where any do. Any thread."""
        return self._transport.room(forms)

    def expected_weights(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every tensor of a version."""
        return self._expected

    def scale(self, engines: int) -> None:
        """Sets how many engines there should be; takes effect with the next `poll`. More are started in the background; those
        that are too many end the samples they have begun, and leave."""
        if engines < 1:
            raise ClusterError(f"engines: {engines} is less than 1; use at least one")
        self._fleet.wanted = engines

    def engines(self) -> list[EngineStatus]:
        """What is known of each engine."""
        return [engine.status() for engine in list(self._engines)]

    def stats(self) -> dict[str, float | int | str]:
        """Figures of the pool."""
        states = [status.state for status in self.engines()]
        return {"engines": len(states), "busy": states.count("busy"), "loading": states.count("loading"),
                "waiting": states.count("waiting"), "restarts": self._restarts, "version": self.version,
                "queued": self._backlog.waiting, "tokens_per_s": round(sum(e.tokens_per_s for e in self._engines), 1)}

    def close(self) -> None:
        """Stops the engines, and Ray if it was started here."""
        for engine in self._engines:
            engine.stop()
        self._engines.clear()
        if self._own_ray:
            ray.shutdown()

    def _wait_until_loaded(self) -> None:
        end = time.monotonic() + self._answer_s
        while not self._fleet.started(time.monotonic() > end, self._own_ray):
            self._pump(0.1)
        self._expected = next(engine.expected for engine in self._engines if engine.expected)

    def _pump(self, timeout: float, also: Sequence[Any] = ()) -> None:
        """Waits up to `timeout` seconds for news of engines, or for one of the calls in `also`; then does all there is to do."""
        calls = {call: engine for engine in self._engines for call in engine.calls()}
        waited = [*calls, *also]
        if waited:
            ready, _ = ray.wait(waited, num_returns=1, timeout=timeout)
            if ready and len(waited) > 1:
                ready, _ = ray.wait(waited, num_returns=len(waited), timeout=0)
        else:
            time.sleep(min(timeout, 0.05))
            ready = []
        for call in ready:
            if (engine := calls.get(call)) is not None and call in engine.calls():
                self._read(engine, call)
        now = time.monotonic()
        # A pool that read nothing for long may have missed heartbeats.
        slept, self._read_at = max(0.0, now - self._read_at - max(timeout, LOOK_S)), now
        for engine in list(self._engines):
            try:
                engine.check(now, slept)
            except EngineLost as lost:
                self._lose(engine, str(lost))
        if now - self._looked >= LOOK_S or not self._engines or any(e.loaded or e.may_start for e in self._engines):
            self._looked = now
            self._fleet.look(now, self.version, self._transport, hold=self._committing or self._interruptions.labels)
        self._deal()

    def _read(self, engine: EngineHandle, call: Any) -> None:
        try:
            report = engine.read(call)
        except EngineLost as lost:
            self._lose(engine, f"it died: {lost}")
        else:
            if report is not None:
                self._take(engine, report)

    def _take(self, engine: EngineHandle, report: Report) -> None:
        """Hands out what an engine reports."""
        for item in report.completed:
            work = self._backlog.take(item)
            if work is None:
                continue
            self._early.append(item)
            if item.trajectory is not None:
                self._dealer.take_back(engine, work, item.trajectory.sample)
            else:
                self._drop([work])
        self._progress += [item for item in report.progress if item.request_id in self.watched]
        returned: dict[Work, list[int]] = {}
        for name, number, epoch in report.returned or ():
            work = self._backlog.works.get(name)
            if work is not None and work.epoch == epoch and self._dealer.take_back(engine, work, number):
                returned.setdefault(work, []).append(number)
        self._interruptions.end_unheld(returned)
        self._strategy.again(list(returned.items()))

    def _lose(self, engine: EngineHandle, why: str) -> None:
        """Gives up an engine's process. What it had is dealt again, or has failed."""
        _log.warning("engine %d is replaced: %s", engine.id, why)
        self._restarts += 1
        engine.lose(why)
        had = list(engine.samples)
        go_on, failed = self._suspects.note_death(engine)
        self._interruptions.end_unheld(had)
        self._strategy.again(go_on)
        for work in failed:
            self._early.append(Completed(work.epoch, work.request.id, error=(
                f"request {work.request.id!r}: {work.solo_deaths} engines in a row died while they served nothing else ({why}); "
                "see the logs of Ray, or leave the request out")))
            self._drop([work])
        self._deal()

    def _drop(self, works: Sequence[Work]) -> None:
        """Ends works; what engines have of them is dropped."""
        for engine in self._engines:
            if held := [work for work in works if work in engine.samples]:
                engine.actor.cancel.remote([work.request.id for work in held])
                for work in held:
                    for number in list(engine.samples[work]):
                        self._dealer.take_back(engine, work, number)
        for work in works:
            self._backlog.forget(work)

    def _deal(self) -> None:
        if self._interruptions.held:
            return
        self._suspects.deal(self._engines)
        self._strategy.deal(self._engines)
