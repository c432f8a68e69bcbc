"""A Ray actor around one engine.

Invariants:
- One thread owns the engine: it runs `serve`, a loop of steps. Everything else that is asked of the engine waits in a queue
  and is done by that thread between two steps.
- Samples leave as they end, in the reports that `serve` streams.
- `control` answers while a step runs, however long that takes: the process lives.
- A weight version is staged beside the one that serves.
"""

from __future__ import annotations

import os
import queue
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import numpy as np
import ray
import torch

from ...errors import RequestError
from ...model.checkpoint import load_policy
from ...model.device import placement
from ..backend import Completed, InFlightPolicy
from ..engine import Engine
from ..staged_weights import StagedWeights
from ..types import RolloutRequest, SamplingParams
from .figures import EngineFigures
from .reports import Heartbeat, Home, Loaded, Part, Report
from .spec import EngineSpec
from .watched_samples import WatchedSamples
from .weight_transport import Ticket

_REPORT_S = 0.02
"""Seconds between two reports of an engine with work. A report costs Ray about a millisecond, on both sides."""
_VISIBLE = ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


@ray.remote(max_restarts=0, concurrency_groups={"control": 1, "weights": 1, "hold": 1})
class EngineActor:
    """One engine in a process of its own.

    Args:
        version, weights: the version to serve, and a ticket to its tensors; None for those of `spec.policy` itself.
    """

    def __init__(self, spec: EngineSpec, version: int, weights: Ticket | None) -> None:
        self._spec, self._start = spec, (version, weights)
        self._engine: Engine
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._report = Report()
        self._figures = EngineFigures()
        self._epochs: dict[str, int] = {}
        self._staged: dict[int, StagedWeights] = {}
        self._watched = WatchedSamples()
        self._turns = self._steps = 0
        self._alone = self._held = False

    @ray.method(concurrency_group="control")
    def home(self) -> Home:
        """Where the process runs. Answers before the policy is loaded."""
        seen = next((f"{name}={os.environ[name]}" for name in _VISIBLE if os.environ.get(name)), "")
        return Home(os.getpid(), ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id(), seen)

    def load(self) -> Loaded:
        """Loads the policy."""
        spec, (version, weights) = self._spec, self._start
        torch.set_num_threads(max(1, int(spec.num_cpus)))
        dtype, device = _placement(spec)
        self._engine = Engine(load_policy(spec.policy, dtype, device), spec.config)
        if weights is not None:
            self._engine.load_weights(self._stage(version, weights, None), version)
        self._engine.version = version
        self._start = (version, None)
        if self._engine.planner is None:  # a planner has measured steps
            self._warm_up()
        state = self._engine.policy.state_dict()
        if self._engine.policy.config.tie_word_embeddings:
            state.pop("lm_head.weight")
        expected = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in state.items()}
        return Loaded(self._engine.version, str(device), expected)

    @ray.method(num_returns="streaming")
    def serve(self) -> Iterator[Report]:
        """Serves until the process ends."""
        torch.set_num_threads(max(1, int(self._spec.num_cpus)))  # OpenMP's setting belongs to the thread
        reported = 0.0
        while True:
            if not self._steps_on and not self._news():
                self._inbox.get()()
            while not self._inbox.empty():
                self._inbox.get()()
            if self._steps_on:
                for trajectory in self._engine.step():
                    self._ended(trajectory.request_id, trajectory)
                self._report_failures()
                self._steps += 1
            self._turns += 1
            now = time.monotonic()
            if self._watched and now - reported >= _REPORT_S:
                self._report.progress = self._watched.take(self._engine.scheduler.running)
            if self._news() and (now - reported >= _REPORT_S or not self._steps_on or self._alone):
                self._report.fresh = self._engine.scheduler.fresh
                self._report.steps = self._steps if self._alone else 0
                report, self._report, reported = self._report, Report(), now
                yield report

    @ray.method(concurrency_group="control")
    def add(self, parts: Sequence[Part]) -> None:
        """Adds samples, in this order, between two steps. A request that the engine refuses is reported."""
        self._inbox.put(lambda: self._add(parts))

    @ray.method(concurrency_group="control")
    def cancel(self, request_ids: Collection[str]) -> None:
        """Drops the unfinished samples of these requests between two steps. What ended before may still be reported."""
        self._inbox.put(lambda: self._cancel(set(request_ids)))

    @ray.method(concurrency_group="control")
    def give_back(self, count: int) -> None:
        """Reports up to `count` samples that have not begun as returned, between two steps."""
        self._inbox.put(lambda: self._give_back(count))

    @ray.method(concurrency_group="control")
    def heartbeat(self) -> Heartbeat:
        """Figures of this moment."""
        engine = self._engine
        works = not self._held and (engine.has_work or not self._inbox.empty())
        return Heartbeat(self._turns, works, engine.version, engine.decode_tokens, self._figures.read(engine))

    @ray.method(concurrency_group="hold")
    def hold(self, held: bool) -> None:
        """Makes no step from now on, or goes on. Returns between two steps."""

        def set_held() -> None:
            self._held = held

        self._between_steps(set_held)

    @ray.method(concurrency_group="control")
    def abort(self, request_ids: Collection[str]) -> None:
        """Ends the unfinished samples of these requests between two steps, and reports each with the tokens that it has."""
        self._inbox.put(lambda: self._abort(request_ids))

    @ray.method(concurrency_group="hold")
    def reset_prefix_cache(self) -> None:
        """Forgets the K/V that is kept for reuse. Returns when that is done, between two steps."""
        self._between_steps(self._engine.scheduler.forget_prompts)

    @ray.method(concurrency_group="weights")
    def label(self, version: int) -> None:
        """The weights that serve have this version number from now on. Returns between two steps."""

        def set_version() -> None:
            self._engine.version = version

        self._between_steps(set_version)

    @ray.method(concurrency_group="weights")
    def stage(self, version: int, weights: Ticket | None, changed: Collection[str] | None = None) -> None:
        """Stages a version; raises if a tensor does not fit the policy.

        Args:
            weights: ticket to its tensors; None where none has changed.
            changed: the names of the tensors that are not those which serve here; None for all.
        """
        torch.set_num_threads(max(1, int(self._spec.num_cpus)))  # OpenMP's setting belongs to the thread
        self._staged = {}
        self._staged = {version: self._stage(version, weights, changed)}

    @ray.method(concurrency_group="weights")
    def unstage(self) -> None:
        """Frees what is staged."""
        self._staged = {}

    @ray.method(concurrency_group="weights")
    def commit(self, version: int, in_flight: InFlightPolicy) -> int:
        """Takes the staged version between two steps.

        Args: in_flight: what happens to unfinished samples. `keep`, `recompute`: see `Engine.load_weights`. `abort`:
            those that have a generated token end where they are. `finish`: the caller has waited until there are none.
        """
        staged = self._staged.pop(version)

        def take() -> None:
            begin = time.monotonic()
            if in_flight == "abort":
                for trajectory in self._engine.abort_begun():
                    self._ended(trajectory.request_id, trajectory)
                self._report_failures()
            self._engine.load_weights(staged, version, "recompute" if in_flight == "recompute" else "keep")
            self._figures.commit_seconds = time.monotonic() - begin

        self._between_steps(take)
        return version

    @property
    def _steps_on(self) -> bool:
        """Whether the engine makes a step next."""
        return self._engine.has_work and not self._held

    def _between_steps(self, act: Callable[[], None]) -> None:
        """Has the engine's thread do something between two steps; returns when it is done, or raises what it raised."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                act()
            except BaseException as error:
                done.set_exception(error)  # raised to the caller, in another thread
            else:
                done.set_result(None)

        self._inbox.put(run)
        done.result()

    def _warm_up(self) -> None:
        """Decodes a little, so that what is compiled or loaded at first use is there when work comes."""
        params = SamplingParams(sampler="coupled", max_tokens=4, ignore_eos=True)
        with suppress(RequestError):  # weights whose logits overflow; requests will say so
            self._engine.rollout([RolloutRequest("warm-up", (0, 0), params)])
        self._engine.forwards = self._engine.decode_tokens = 0

    def _news(self) -> bool:
        report = self._report
        return bool(report.completed or report.progress) or report.returned is not None or (self._alone and self._steps_on)

    def _add(self, parts: Sequence[Part]) -> None:
        for part in parts:
            self._epochs[part.request.id] = part.epoch
            self._alone, self._steps = part.alone, 0
            try:
                self._engine.add_samples(part.request, part.numbers, part.client, part.order)
                if part.watched:
                    self._watched.add(part.request.id, part.numbers)
            except RequestError as error:
                self._report.completed.append(Completed(part.epoch, part.request.id, error=str(error)))
        self._forget_epochs()

    def _cancel(self, request_ids: Collection[str]) -> None:
        self._engine.cancel(request_ids)
        self._watched.drop(request_ids)
        for name in request_ids:  # one of its samples may have failed as it was dropped
            self._engine.failed.pop(name, None)
        self._report.completed = [item for item in self._report.completed if item.request_id not in request_ids]
        if self._report.returned is not None:
            self._report.returned = [item for item in self._report.returned if item[0] not in request_ids]

    def _abort(self, request_ids: Collection[str]) -> None:
        for trajectory in self._engine.cancel(request_ids):
            self._ended(trajectory.request_id, trajectory)
        self._report_failures()

    def _give_back(self, count: int) -> None:
        given = [(name, number, self._epochs[name]) for name, number in self._engine.scheduler.give_back(count)]
        for name, number, _ in given:
            self._watched.end(name, number)
        self._report.returned = (self._report.returned or []) + given

    def _ended(self, request_id: str, trajectory: Any) -> None:
        self._figures.note(trajectory.trace)
        self._watched.end(request_id, trajectory.sample)
        self._report.completed.append(Completed(self._epochs[request_id], request_id, trajectory))

    def _report_failures(self) -> None:
        """Reports the requests that failed while they were decoded."""
        for name, error in self._engine.failed.items():
            self._report.completed.append(Completed(self._epochs[name], name, error=str(error)))
        self._watched.drop(self._engine.failed)
        self._engine.failed.clear()

    def _forget_epochs(self) -> None:
        """Forgets the leases of requests that are not here, from time to time."""
        if len(self._epochs) > 64 + 2 * self._engine.scheduler.pending:
            self._epochs = {name: epoch for name, epoch in self._epochs.items() if self._engine.scheduler.serves(name)}

    def _stage(self, version: int, weights: Ticket | None, changed: Collection[str] | None) -> StagedWeights:
        own = self._engine.policy.state_dict()
        tensors = {}
        for name, given in ({} if weights is None else weights.read()).items():
            tensor = given if isinstance(given, torch.Tensor) else _lent(given)
            if tensor.dtype == torch.uint16 and name in own and own[name].dtype == torch.bfloat16:
                tensor = tensor.view(torch.bfloat16)
            tensors[name] = tensor
        return self._engine.stage_weights(tensors, version, changed)


def _lent(array: np.ndarray) -> torch.Tensor:
    """The memory of an array as a tensor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor does an engine write to it
        return torch.from_numpy(array)


def _placement(spec: EngineSpec) -> tuple[str, torch.device]:
    """dtype and device of this process; `auto` is a GPU only where Ray gave it one. Raises InvalidInput for a GPU not here."""
    auto = "cuda" if spec.num_gpus > 0 else "cpu"
    return placement(auto if spec.device == "auto" else spec.device, spec.dtype)
