"""The engine: prompts in, trajectories out.

Invariants:
- A step is schedule -> plan -> forward -> verify -> commit.
- Tokens do not depend on the batch: random numbers are keyed by (sample seed, position), and drafts outlive preemption.
  Only a planner (`auto`) looks at the batch, when it chooses the schedule.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import RequestError
from ..model.arguments import require, short
from ..model.policy import Policy
from ..model.twin import copy_tensors
from .cache import PagedCache
from .checks import check_config, check_requests
from .failures import trajectories, unless_failed
from .generate import Prompts, as_requests, check_request, longest, policy_of, stop_tokens, with_options
from .kv_memory import check_kv_memory, pool_pages, prefill_rows, schedules_of
from .outputs import RolloutOutput, as_outputs
from .placed import placed, where_placed
from .planning.calibration import AR, calibrated_planner
from .planning.planner import Planner
from .planning.step_costs import clock
from .progress import sample_meter
from .prompt_logprobs import PromptLogprobs
from .schedule import Schedule
from .scheduler import Scheduler
from .sequence import Sample, SchedulerOutput
from .staged_weights import StagedWeights, Weights, checked, stage, take
from .steps.commit import commit
from .steps.plan import StepPlan
from .steps.runner import StepOutput, StepRunner
from .stop_strings import StopStrings
from .types import RolloutRequest, SamplingParams, Trajectory


@dataclass(frozen=True)
class EngineConfig:
    """Sizes and schedule of an engine.

    Attributes:
        schedule: what a decode step runs. With `auto` the engine measures step times when it is made, unless they are on disk.
        block_size, draft_temperature: mask rows per block, 2..64; as in `Policy`, 0.1..2. None for the policy's own.
        max_batch: most samples decoded at once.
        pages, page_size: K/V pool. kv_memory: instead of `pages`, a fraction of what is free, or "20GB" (`kv_memory.pool_pages`).
        prefill_rows: most prompt rows of one step; None for 512 on a CPU and 2048 on a GPU (`kv_memory.prefill_rows`).
        enable_prefix_caching: a request reuses the K/V of earlier requests whose tokens begin as its own do, page by page. Pages
            that no sample uses are kept within the pool, the least recently used ones are given up first, and none outlives its
            weight version.
        captured: where kernels run, pad decode steps to few shapes, and capture their forward passes in graphs where the device
            can. capture_batches: at these numbers of samples; None for all up to `max_batch`.
        batch_invariant: on a GPU, a sample's numbers do not depend on what is decoded beside it (`kernels.dispatch.using`).
        repeatable: `auto` chooses by stored step times alone and ignores the times of its own steps. Then the same requests give
            the same samples again on the same machine, with `lossless` and `mixed` too.
    """

    schedule: Schedule = Schedule()
    block_size: int | None = None
    draft_temperature: float | None = None
    max_batch: int = 32
    pages: int | None = None
    page_size: int = 32
    prefill_rows: int | None = None
    kv_memory: float | str | None = None
    enable_prefix_caching: bool = True
    captured: bool = True
    capture_batches: tuple[int, ...] | None = None
    batch_invariant: bool = False
    repeatable: bool = False

    def __post_init__(self) -> None:
        check_config(self)
        check_kv_memory(self.kv_memory, self.pages)


class Engine:
    """Decodes requests with one policy, in this process. On a CPU a step has torch's number of threads.

    Attributes:
        version: weight version every new token is tagged with.
        schedule: what each step runs; not read where there is a planner and a sample decodes.
        runner: plans and runs steps.
        forwards, decode_tokens: totals since the start; passes that only prefill are not counted.
        planner: chooses the schedule of each step with `auto`; None where the schedule is fixed.
        failed: why requests ended without trajectories, by id, since the caller last emptied it (`failures`).
    """

    def __init__(
        self, policy: Policy | str | os.PathLike[str], config: EngineConfig | None = None, *,
        device: str | torch.device | None = None, dtype: str | None = None, **options: Any,
    ) -> None:  # fmt: skip
        """Args:
            policy: a policy, or the name or directory of one (`load_policy`).
            device, dtype: where and as what a named policy is loaded; by default an accelerator if there is one, and bfloat16
                there, float32 on a CPU.
            options: fields of EngineConfig, in place of `config`'s. A schedule may be given by its name (`schedule="auto"`).

        Raises:
            CheckpointError: the name or directory holds no policy. RequestError: an option is unknown or out of range.
        """
        self.config = with_options(config or EngineConfig(), options)
        self.policy = policy = policy_of(policy, device, dtype)
        self.failed = dict[str, RequestError]()
        if policy.device.type != "cpu":
            policy.pack()
        self.block_size = self.config.block_size or policy.block_size
        pages = pool_pages(policy, self.config, self.block_size)
        self.cache = PagedCache(policy, pages, self.config.page_size, 2 * self.config.max_batch, self.block_size + 1)
        reuses = self.config.enable_prefix_caching
        self.scheduler = Scheduler(self.cache, self.config.max_batch, prefill_rows(self.config, policy), reuses)
        self.runner = StepRunner(policy, self.cache, self.config.captured, self.config.draft_temperature)
        self.version = self.forwards = self.decode_tokens = self._arrivals = self._calls = 0
        self.schedule = self.config.schedule.within(self.block_size)
        with placed(self):
            every, chosen = range(1, self.config.max_batch + 1), self.config.capture_batches
            self.runner.capture(schedules_of(self.schedule, self.block_size), every if chosen is None else chosen)
        self._now = clock(policy)
        self.planner: Planner | None = None
        if self.schedule.kind == "auto":
            self.planner = self._calibrated_planner()

    @property
    def has_work(self) -> bool:
        """Whether a sample waits or runs."""
        return self.scheduler.pending > 0

    @property
    def prefilled_tokens(self) -> int:
        """Rows prefilled since the start."""
        return self.scheduler.prefilled_tokens

    @property
    def cached_tokens(self) -> int:
        """Rows since the start that were not prefilled, because their K/V was kept."""
        return self.scheduler.cached_tokens

    def check(self, *requests: RolloutRequest) -> None:
        """Raise RequestError where this engine cannot serve one of the requests, or where an id is not unique among the requests
        and the unfinished ones."""
        check_requests(requests, self.scheduler.serves)
        for request in requests:
            check_request(request, self.policy, self.cache)

    def add(self, request: RolloutRequest, without: Collection[int] = ()) -> None:
        """Queue a request's samples, except the numbers in `without`.

        Raises:
            RequestError: `check` refuses the request. Nothing is queued.
        """
        self.check(request)
        self._queue(request, [number for number in range(request.samples) if number not in without])

    def add_samples(
        self, request: RolloutRequest, numbers: Sequence[int], client: str = "", arrival: int | None = None
    ) -> None:
        """Queue samples of a request of which others may be unfinished.

        Args:
            numbers: of samples that are not here.
            client: whose request it is; clients share the engine fairly.
            arrival: its place among the requests, the oldest first; None for the last place. No two may have the same.

        Raises:
            RequestError: this engine cannot serve the request. Nothing is queued.
        """
        check_request(request, self.policy, self.cache)
        self._queue(request, numbers, client, arrival)

    def _queue(self, request: RolloutRequest, numbers: Iterable[int], client: str = "", arrival: int | None = None) -> None:
        """`add_samples` of a request that was checked."""
        params, limit, stops = request.params, longest(request, self.policy), stop_tokens(request.params, self.policy)
        shared = None if params.prompt_logprobs is None else PromptLogprobs(self.policy, self.runner.model.backend, request)
        known = self.scheduler.arrival(request.id)
        place = known if known is not None else self._arrivals if arrival is None else arrival
        self._arrivals = max(self._arrivals, place + 1)
        for number in numbers:
            sample = Sample(request, number, limit, list(request.prompt_tokens), stops, place, client, shared)
            if params.stop:
                sample.stop_strings = StopStrings(self.policy.tokenizer, params, len(request.prompt_tokens))
            if params.routed_experts:
                sample.experts = np.full((limit, self.policy.config.num_hidden_layers), -1, dtype=np.int16)
            self.scheduler.add(sample)

    def generate(
        self, prompts: Prompts, params: SamplingParams | Sequence[SamplingParams] | None = None, *, progress: bool = True
    ) -> list[RolloutOutput]:
        """Sample completions of prompts. Returns one output per prompt, in order; each holds its samples in order.

        Args:
            prompts: a list of texts, lists of token ids, chats (lists of {"role", "content"} messages, written by the tokenizer's
                chat template) or RolloutRequests; or a single one of these.
            params: one for all prompts, or one per prompt. `n` is the number of samples, and `seed` the seed, of each prompt.
                Without a seed, two prompts, and two calls, draw other numbers; the same calls of a new engine draw the same.
                RolloutRequests have parameters of their own.
            progress: show a bar while it runs, where stderr is a terminal.

        Raises:
            RequestError: one of the prompts cannot be served, or the engine holds samples of `add`. Then no prompt is served.
        """
        requests, texts = as_requests(prompts, params, self.policy, f"generate-{self._calls}")
        self._calls += 1
        with sample_meter("generate", sum(request.samples for request in requests), progress) as meter:
            done = self.rollout(requests, lambda sample: meter.advance(len(sample.tokens), sample.forwards))
        return as_outputs(requests, texts, done, self.policy.tokenizer)

    def rollout(
        self, requests: Sequence[RolloutRequest], on_finish: Callable[[Trajectory], None] | None = None
    ) -> list[Trajectory]:
        """Serve requests to the end. Returns their trajectories in the order of the requests, then of the samples.

        The engine is empty afterwards, also when `on_finish` raises or Ctrl-C ends the call early.

        Raises:
            RequestError: one of the requests cannot be served (`check`), or the engine holds samples of earlier `add`s: no
                request of the call is queued. Or a log-probability is not finite: all samples of the call are given up.
        """
        if self.has_work:
            raise RequestError("requests", f"the engine still holds {self.scheduler.pending} samples of earlier requests",
                               "serve them with step(), or end them with abort(), before rollout()")  # fmt: skip
        check_requests(requests, self.scheduler.serves)
        self.check(*requests)
        self.failed.clear()
        order = {request.id: i for i, request in enumerate(requests)}
        done = list[Trajectory]()
        try:
            for request in requests:
                self._queue(request, range(request.samples))
            while self.has_work:
                for trajectory in unless_failed(self.step(), self.failed):
                    done.append(trajectory)
                    if on_finish is not None:
                        on_finish(trajectory)
        except BaseException:
            self.abort()
            raise
        return sorted(done, key=lambda t: (order[t.request_id], t.sample))

    @where_placed
    def step(self) -> list[Trajectory]:
        """One decode step of every running sample; returns the samples that ended. Requests that failed are in `failed`."""
        if not self.has_work:
            return []
        start = self._now()
        batch = self.scheduler.next(self.block_size + 1)
        plan = self.runner.plan(self._choose(batch), batch)
        forward = self.runner.forward(plan)
        output = self.runner.verify(plan, forward)
        self._commit(plan, output)
        self._observe(batch, start)
        return self._finish(batch)

    def stage_weights(self, tensors: Weights, version: int, changed: Collection[str] | None = None) -> StagedWeights:
        """Prepare a version for `load_weights`, in any thread; see `staged_weights.stage`. The tensors must not change later."""
        return stage(self.policy, self.runner.model.backend, tensors, version, changed)

    def load_weights(self, tensors: Weights | StagedWeights, version: int, in_flight: str = "keep") -> None:
        """Take a whole weight version, between two steps. An error changes nothing.

        Args:
            tensors: every tensor of the policy's `state_dict`, by name, on any device, of any float dtype. They are copied. The
                head of a policy that ties it to the embedding may be missing. Or what `stage_weights` has returned.
            version: the number that new tokens carry, 0 <= version < 2**31.
            in_flight: `keep` continues running samples on the old K/V; `recompute` prefills them again under the new weights.
                Running samples without a generated token are always prefilled again.

        Raises:
            RequestError: the tensors do not fit the policy (names, shapes, dtypes, finite numbers), or the version or `in_flight`
                is out of range.
        """
        require(in_flight in ("keep", "recompute"), "in_flight", f"unknown value {short(in_flight)}", "use keep or recompute")
        if not isinstance(tensors, StagedWeights):
            copy_tensors(self.policy, checked(self.policy, tensors, version))
            self.runner.take_weights()
        elif tensors.tensors:
            take(self.policy, tensors)
            self.runner.take_weights(tensors.folded)
        self.version = int(version)
        self.scheduler.forget_prompts()
        self.scheduler.recompute(begun=in_flight == "recompute")

    def abort(self) -> list[Trajectory]:
        """End every unfinished sample where it is. Returns their trajectories, oldest first; some may have no token."""
        return self._aborted(self.scheduler.clear())

    def abort_begun(self) -> list[Trajectory]:
        """End those unfinished samples that have a generated token, as `abort` does. The others go on."""
        return self._aborted(self.scheduler.drop_begun())

    def cancel(self, request_ids: Collection[str]) -> list[Trajectory]:
        """End the unfinished samples of these requests, as `abort` does. The others go on."""
        return self._aborted(self.scheduler.drop_requests(request_ids))

    def _aborted(self, ended: list[Sample]) -> list[Trajectory]:
        self.runner.forget_samples()
        for sample in ended:
            sample.finish = "abort"
        return trajectories(ended, self.failed, self.cancel)

    def _choose(self, batch: SchedulerOutput) -> Schedule:
        """The schedule of a step over these samples. It does not matter where none of them decodes."""
        return self.planner.choose(batch.decoding) if self.planner and batch.decoding else self.schedule

    def _observe(self, batch: SchedulerOutput, start: float) -> None:
        """Tell the planner what the step that began at `start` made, and how long it took if it prefilled nothing."""
        if self.planner and batch.decoding:
            self.planner.observe(batch.decoding, None if batch.prefills else self._now() - start)

    def _commit(self, plan: StepPlan, output: StepOutput | None) -> None:
        """Count the prompt rows that are in the cache now, and write what the step gave into its samples."""
        if plan.batch.prefills:
            for sample, chunk, _ in plan.batch.scheduled:
                assert sample.block_table is not None
                sample.block_table.length += chunk
                if chunk:
                    self.scheduler.prefilled(sample)
        if output is not None:
            self.decode_tokens += commit(plan, output, self.version)
            self.forwards += plan.forwards

    def _finish(self, batch: SchedulerOutput) -> list[Trajectory]:
        """Remove the samples that ended from the scheduler; returns their trajectories."""
        ended = [sample for sample in batch.decoding if sample.finish is not None]
        for sample in ended:
            self.scheduler.retire(sample)
        return trajectories(ended, self.failed, self.cancel) if ended else []

    def _calibrated_planner(self) -> Planner:
        """A planner that knows this engine's step times. They are measured now where they are not known."""

        def run(schedule: Schedule) -> list[Sample]:
            self.schedule = schedule
            self.step()
            return [sample for sample in self.scheduler.running if sample.prefilled]

        planner = calibrated_planner(
            self.policy, self.block_size, self.config.max_batch, self.cache.total_pages, self.cache.page_size,
            self.config.repeatable, self.add, run, self.scheduler.clear,
        )  # fmt: skip
        self.schedule, self.forwards, self.decode_tokens, self._arrivals = AR, 0, 0, 0
        self.scheduler.prefilled_tokens = self.scheduler.cached_tokens = 0
        return planner
