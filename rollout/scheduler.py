"""The scheduler: admission in order of arrival, one prefill per group, chunked prefill, preemption.

Invariants:
- The order is by arrival and sample number alone, so a batch submitted whole is always served the same way.
- A running sample has pages for everything the coming step may write. When the pool is empty the youngest sample is preempted.
  The oldest never is, so every sample ends.
- A sample begins its prefill behind the longest beginning of its tokens that the cache keeps, whoever computed it. A preempted
  sample that comes back finds its own pages there, unless other samples needed them.
- The step that prefills the last rows of a prompt decodes the sample too: no step reads the weights for a prompt alone.
- A step's cost depends on the samples that run, not on the number of samples that wait.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .cache import BlockTable, PagedCache
from .sequence import Sample, ScheduledSample, SchedulerOutput


@dataclass(eq=False, slots=True)
class _Group:
    """The unfinished samples of one request.

    Attributes:
        arrival: number of the request, in the order of arrival.
        unfinished: samples that wait or run.
        fresh: waiting samples without a generated token, by number: they may share the group's prompt.
        resumed: other waiting samples, preempted before, by number.
    """

    arrival: int
    unfinished: int = 0
    fresh: deque[Sample] = field(default_factory=deque)
    resumed: deque[Sample] = field(default_factory=deque)

    @property
    def waits(self) -> bool:
        """Whether a sample waits."""
        return bool(self.fresh or self.resumed)

    def queue(self, fresh_too: bool) -> deque[Sample] | None:
        """The queue whose first sample is next; None where no sample may be next.

        Args:
            fresh_too: whether fresh samples may be next.
        """
        fresh, resumed = self.fresh if fresh_too else None, self.resumed
        if not fresh:
            return resumed or None
        return resumed if resumed and resumed[0].number < fresh[0].number else fresh


class _SharedPrompt(NamedTuple):
    """A prompt in the cache, for the samples of its group that wait: its block table, and the experts of its rows,
    int16[P - 1, L], where they are recorded."""

    table: BlockTable
    experts: np.ndarray | None


class Scheduler:
    """Waiting and running samples.

    Args:
        max_batch: most samples running at once.
        prefill_rows: most prompt rows of one step over all samples.
        prefix_caching: whether samples reuse what the cache keeps.

    Attributes:
        running: samples in the cache, in order of admission.
        preemptions: how often a sample was preempted so far.
        prefilled_tokens: rows prefilled so far.
        cached_tokens: rows that were not prefilled, because the cache kept them.
    """

    def __init__(self, cache: PagedCache, max_batch: int, prefill_rows: int, prefix_caching: bool = True) -> None:
        self.cache, self.max_batch, self.prefill_rows, self.prefix_caching = cache, max_batch, prefill_rows, prefix_caching
        self.running: list[Sample] = []
        self.preemptions = self.prefilled_tokens = self.cached_tokens = 0
        self._groups: dict[str, _Group] = {}
        self._waiting: deque[_Group] = deque()  # groups with a waiting sample, by arrival
        self._waiting_samples = 0
        self._prompts: dict[str, _SharedPrompt] = {}

    @property
    def pending(self) -> int:
        """Samples not finished."""
        return len(self.running) + self._waiting_samples

    @property
    def waiting(self) -> list[Sample]:
        """Samples that wait, oldest first."""
        return sorted((s for group in self._waiting for s in (*group.fresh, *group.resumed)), key=_age)

    def serves(self, request_id: str) -> bool:
        """Whether a sample of the request is not finished."""
        return request_id in self._groups

    def add(self, sample: Sample) -> None:
        """Queue a sample."""
        group = self._groups.get(sample.request.id)
        if group is None:
            group = self._groups[sample.request.id] = _Group(sample.arrival)
        group.unfinished += 1
        self._wait(sample)

    def clear(self) -> list[Sample]:
        """Give up every sample, and return them, oldest first. Afterwards nothing is in use, even if an exception had stopped a
        step half way."""
        given_up = sorted([*self.running, *self.waiting], key=_age)
        for sample in given_up:
            sample.block_table = sample.drafts = None
        self.running.clear()
        self._groups.clear()
        self._waiting.clear()
        self._waiting_samples = 0
        self._prompts.clear()
        self.cache.release_all()
        return given_up

    def drop_begun(self) -> list[Sample]:
        """Give up every sample that has a generated token, and return them, oldest first. Must be called between two steps."""
        return self._drop([s for s in (*self.running, *self.waiting) if not _is_fresh(s)])

    def drop_requests(self, request_ids: Collection[str]) -> list[Sample]:
        """Give up every sample of these requests, and return them, oldest first. Must be called between two steps."""
        return self._drop([s for s in (*self.running, *self.waiting) if s.request.id in request_ids])

    def _drop(self, samples: list[Sample]) -> list[Sample]:
        for sample in samples:
            if sample.block_table is None:
                group = self._groups[sample.request.id]
                (group.fresh if _is_fresh(sample) else group.resumed).remove(sample)
                self._waiting_samples -= 1
                if not group.waits:
                    self._waiting.remove(group)
            self.retire(sample)
        return sorted(samples, key=_age)

    def retire(self, sample: Sample) -> None:
        """Remove a finished sample that does not wait: its pages, its slot and its drafts are freed."""
        if sample.block_table is not None:
            self._release(sample)
        sample.drafts = None
        group = self._groups[sample.request.id]
        group.unfinished -= 1
        if not group.unfinished:
            del self._groups[sample.request.id]
        if not group.waits:
            self._forget_prompt(sample.request.id)

    def next(self, rows: int) -> SchedulerOutput:
        """The samples of the coming step, oldest first.

        Args:
            rows: most positions a decode step writes per sample, the anchor included.
        """
        self._admit()
        step: list[ScheduledSample] = []
        budget = self.prefill_rows
        for sample in sorted(self.running, key=_age):
            if sample.block_table is None:
                continue
            if budget and not sample.block_table.length:
                self._reuse(sample)
            missing = sample.anchor - sample.block_table.length
            chunk = min(missing, budget)
            if missing and not chunk:
                continue
            decodes = chunk == missing
            target = sample.anchor + min(rows, sample.remaining + 1) if decodes else sample.block_table.length + chunk
            if self._make_room(sample, target):
                budget -= chunk
                step.append(ScheduledSample(sample, chunk, decodes))
        step = [each for each in step if each.sample.block_table is not None]
        self.prefilled_tokens += sum(chunk for _, chunk, _ in step)
        return SchedulerOutput.of(step)

    def prefilled(self, sample: Sample) -> None:
        """Must be called when prompt rows of a sample have come into the cache. Other samples may reuse them, and when all have
        come, its waiting siblings share the prompt."""
        assert sample.block_table is not None
        self._keep(sample)
        request = sample.request
        waits = self._groups[request.id].waits
        if waits and sample.prefilled and request.id not in self._prompts and _is_fresh(sample):
            copy = self.cache.fork(sample.block_table)
            if copy is not None:
                experts = None if sample.experts is None else sample.experts[: sample.anchor].copy()
                self._prompts[request.id] = _SharedPrompt(copy, experts)

    def forget_prompts(self) -> None:
        """Free the shared prompts and what is kept for reuse. Must be called when the weights change."""
        for request_id in list(self._prompts):
            self._forget_prompt(request_id)
        self.cache.reset_prefix_cache()

    def recompute(self, begun: bool = True) -> None:
        """Make running samples prefill again. Must be called when the weights change, so that no sample without a generated token
        keeps, or shares with its siblings, K/V of the old weights.

        Args:
            begun: also the samples that have a generated token.
        """
        for sample in self.running:
            if not (begun or _is_fresh(sample)):
                continue
            assert sample.block_table is not None
            self.cache.release(sample.block_table)
            sample.block_table = self.cache.open()
            sample.own_drafts()

    def _admit(self) -> None:
        """Admit waiting samples, oldest first, until one does not fit. A fresh sample is passed over while a sibling prefills the
        prompt."""
        filling = {s.request.id for s in self.running if not s.prefilled}
        place = 0
        while place < len(self._waiting) and len(self.running) < self.max_batch and self.cache.free_slots:
            group = self._waiting[place]
            request_id = (group.fresh or group.resumed)[0].request.id
            shared = self._prompts.get(request_id)
            queue = group.queue(fresh_too=shared is not None or request_id not in filling)
            if queue is None:
                place += 1
                continue
            sample = queue[0]
            if shared is not None and queue is group.fresh:
                sample.block_table = self.cache.fork(shared.table)
                if shared.experts is not None:
                    sample.record_experts(0, shared.experts)
            elif self.cache.free_pages >= self.cache.pages_for(sample.anchor + 1) or not self.running:
                sample.block_table = self.cache.open()
                filling.add(request_id)
            if sample.block_table is None:
                break
            queue.popleft()
            self._waiting_samples -= 1
            self.running.append(sample)
            if not group.waits:
                del self._waiting[place]

    def _reuse(self, sample: Sample) -> None:
        """Let a sample that has not begun its prefill begin behind what the cache keeps. A sample that records experts runs every
        row."""
        table = sample.block_table
        if table is None or len(table.pages) or not self.prefix_caching or sample.experts is not None:
            return
        found = self.cache.reuse(table, sample.tokens, sample.anchor)
        self.cached_tokens += found
        if found and sample.prefilled:
            self.prefilled(sample)

    def _keep(self, sample: Sample) -> None:
        if self.prefix_caching and sample.block_table is not None:
            self.cache.keep(sample.block_table, sample.tokens)

    def _make_room(self, sample: Sample, positions: int) -> bool:
        """Reserve pages. Where they lack, free the shared prompts first, then preempt the youngest samples. False when the sample
        itself was preempted."""
        assert sample.block_table is not None
        while not self.cache.reserve(sample.block_table, positions):
            if self._prompts:
                self._forget_prompt(next(iter(self._prompts)))
                continue
            youngest = max(self.running, key=_age)
            self._release(youngest)
            youngest.own_drafts()
            self.preemptions += 1
            self._wait(youngest)
            if youngest is sample:
                return False
        return True

    def _wait(self, sample: Sample) -> None:
        """Put the sample into its group's queue, and the group among those that wait."""
        group = self._groups[sample.request.id]
        if not group.waits:
            if not self._waiting or self._waiting[-1].arrival < group.arrival:
                self._waiting.append(group)
            else:  # A preempted sample is older than all groups but those that wait for a sibling's prompt.
                place = next(i for i, other in enumerate(self._waiting) if other.arrival > group.arrival)
                self._waiting.insert(place, group)
        queue = group.fresh if _is_fresh(sample) else group.resumed
        if not queue or queue[-1].number < sample.number:
            queue.append(sample)
        elif sample.number < queue[0].number:
            queue.appendleft(sample)
        else:
            insort(queue, sample, key=lambda other: other.number)
        self._waiting_samples += 1

    def _release(self, sample: Sample) -> None:
        assert sample.block_table is not None
        self.running.remove(sample)
        self._keep(sample)
        self.cache.release(sample.block_table)
        sample.block_table = None

    def _forget_prompt(self, request_id: str) -> None:
        prompt = self._prompts.pop(request_id, None)
        if prompt is not None:
            self.cache.release(prompt.table)


def _age(sample: Sample) -> tuple[int, int]:
    return sample.arrival, sample.number


def _is_fresh(sample: Sample) -> bool:
    """Whether no token has been generated."""
    return len(sample.tokens) == len(sample.request.prompt_tokens)
