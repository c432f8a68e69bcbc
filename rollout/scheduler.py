"""The scheduler: admission in order of arrival, one prefill per group, chunked prefill, preemption.

Invariants:
- The order is by arrival and sample number alone, so a batch submitted whole is always served the same way. Where samples of
  several clients are here, clients take turns: one that runs fewer samples comes first, and takes the place of the youngest
  sample of one that runs more, by two or more.
- A running sample has pages for everything the coming step may write. When the pool is empty the youngest sample is preempted,
  where there are several clients that of the client with most running. The oldest never is, so every sample ends.
- A sample begins its prefill behind the longest beginning of its tokens that the cache keeps, whoever computed it. A preempted
  sample that comes back finds its own pages there, unless other samples needed them.
- The step that prefills the last rows of a prompt decodes the sample too: no step reads the weights for a prompt alone.
- A step's cost depends on the samples that run, not on the number of samples that wait.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from .cache import BlockTable, PagedCache
from .sample_group import SampleGroup, age, fills, is_fresh
from .sequence import Sample, ScheduledSample, SchedulerOutput
from .steady import goes_on
from .turns import above_share, in_turn, next_group, youngest


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
        self._groups: dict[str, SampleGroup] = {}
        self._waiting: deque[SampleGroup] = deque()  # groups with a waiting sample, by arrival
        self._waiting_samples = 0
        self._prompts: dict[str, _SharedPrompt] = {}
        self._clients: Counter[str] = Counter()  # requests with an unfinished sample
        self._latest: SchedulerOutput | None = None

    @property
    def pending(self) -> int:
        """Samples not finished."""
        return len(self.running) + self._waiting_samples

    @property
    def waiting(self) -> list[Sample]:
        """Samples that wait, oldest first."""
        return sorted((s for group in self._waiting for s in (*group.fresh, *group.resumed)), key=age)

    def serves(self, request_id: str) -> bool:
        """Whether a sample of the request is not finished."""
        return request_id in self._groups

    def arrival(self, request_id: str) -> int | None:
        """Number of a request that has an unfinished sample; None for another."""
        group = self._groups.get(request_id)
        return None if group is None else group.arrival

    @property
    def fresh(self) -> int:
        """Waiting samples without a generated token."""
        return sum(len(group.fresh) for group in self._waiting)

    def add(self, sample: Sample) -> None:
        """Queue a sample."""
        group = self._groups.get(sample.request.id)
        if group is None:
            group = self._groups[sample.request.id] = SampleGroup(sample.arrival, sample.client)
            self._clients[sample.client] += 1
        sample.client = group.client  # a request is one client's, whoever adds its later samples
        group.unfinished += 1
        self._wait(sample)

    def clear(self) -> list[Sample]:
        """Give up every sample, and return them, oldest first. Afterwards nothing is in use, even if an exception had stopped a
        step half way."""
        given_up = sorted([*self.running, *self.waiting], key=age)
        for sample in given_up:
            sample.block_table = sample.drafts = None
        self.running.clear()
        self._groups.clear()
        self._clients.clear()
        self._latest = None
        self._waiting.clear()
        self._waiting_samples = 0
        self._prompts.clear()
        self.cache.release_all()
        return given_up

    def drop_begun(self) -> list[Sample]:
        """Give up every sample that has a generated token, and return them, oldest first. Must be called between two steps."""
        return self._drop([s for s in (*self.running, *self.waiting) if not is_fresh(s)])

    def drop_requests(self, request_ids: Collection[str]) -> list[Sample]:
        """Give up every sample of these requests, and return them, oldest first. Must be called between two steps."""
        return self._drop([s for s in (*self.running, *self.waiting) if s.request.id in request_ids])

    def _drop(self, samples: list[Sample]) -> list[Sample]:
        for sample in samples:
            if sample.block_table is None:
                group = self._groups[sample.request.id]
                (group.fresh if is_fresh(sample) else group.resumed).remove(sample)
                self._waiting_samples -= 1
                if not group.waits:
                    self._waiting.remove(group)
            self.retire(sample)
        return sorted(samples, key=age)

    def give_back(self, count: int) -> list[tuple[str, int]]:
        """Remove up to `count` waiting samples without a generated token, those of the youngest requests first. Returns the
        request id and number of each."""
        given: list[tuple[str, int]] = []
        for group in [group for group in reversed(self._waiting) if group.fresh]:
            taken = [group.fresh.pop() for _ in range(min(count - len(given), len(group.fresh)))]
            given += [(sample.request.id, sample.number) for sample in taken]
            if taken:
                self._waiting_samples -= len(taken)
                group.unfinished -= len(taken)
                if not group.waits:
                    self._waiting.remove(group)
                    self._forget_prompt(taken[0].request.id)
                self._forget_group(taken[0].request.id, group)
        return given

    def _forget_group(self, request_id: str, group: SampleGroup) -> None:
        """Forget a group none of whose samples is unfinished."""
        if not group.unfinished:
            del self._groups[request_id]
            self._clients[group.client] -= 1
            if not self._clients[group.client]:
                del self._clients[group.client]

    def retire(self, sample: Sample) -> None:
        """Remove a finished sample that does not wait: its pages, its slot and its drafts are freed."""
        self._latest = None
        if sample.block_table is not None:
            self._release(sample)
        sample.drafts = None
        group = self._groups[sample.request.id]
        group.unfinished -= 1
        self._forget_group(sample.request.id, group)
        if not group.waits:
            self._forget_prompt(sample.request.id)

    def next(self, rows: int) -> SchedulerOutput:
        """The samples of the coming step, oldest first.

        Args:
            rows: most positions a decode step writes per sample, the anchor included.
        """
        self._admit()
        if self._latest is not None and goes_on(self._latest, self.running, self.cache, rows):
            return self._latest
        step: list[ScheduledSample] = []
        budget, preempted, size, several = self.prefill_rows, self.preemptions, self.cache.page_size, len(self._clients) > 1
        for sample in in_turn(self.running) if several else sorted(self.running, key=age):
            table = sample.block_table
            if table is None:
                continue
            if budget and not table.length:
                self._reuse(sample)
            anchor, cached = len(sample.tokens) - 1, table.length
            missing = anchor - cached
            chunk = missing if missing <= budget else budget
            if missing and not chunk:
                continue
            decodes, left = chunk == missing, sample.limit - anchor
            target = cached + chunk if not decodes else anchor + (rows if rows < left else left)
            if target <= len(table.pages) * size or self.cache.reserve(table, target) or self._make_room(sample, target):
                budget -= chunk
                step.append(ScheduledSample(sample, chunk, decodes))
        if self.preemptions > preempted:
            step = [each for each in step if each.sample.block_table is not None]
        if several:
            step.sort(key=lambda each: age(each.sample))
        self._latest = SchedulerOutput.of(step)
        if self._latest.prefills:
            self.prefilled_tokens += sum(chunk for _, chunk, _ in step)
        return self._latest

    def prefilled(self, sample: Sample) -> None:
        """Must be called when prompt rows of a sample have come into the cache. Other samples may reuse them, and when all have
        come, its waiting siblings share the prompt."""
        assert sample.block_table is not None
        self._keep(sample)
        request = sample.request
        waits = self._groups[request.id].waits
        if waits and sample.prefilled and request.id not in self._prompts and is_fresh(sample):
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
        keeps, or shares with its siblings, K/V of the old weights. A sample that has no K/V yet gets a new block table in any
        case: its old one dates from before the weights.

        Args:
            begun: also the samples that have a generated token.
        """
        for sample in self.running:
            assert sample.block_table is not None
            if not (begun or is_fresh(sample) or not sample.block_table.length):
                continue
            self.cache.release(sample.block_table)
            sample.block_table = self.cache.open()
            sample.own_drafts()

    def _admit(self) -> None:
        """Admit waiting samples, oldest first, clients in turn, until one does not fit. A fresh sample is passed over while a
        sibling prefills the prompt."""
        if not self._waiting or (len(self.running) >= self.max_batch and len(self._clients) <= 1):
            return
        passed: list[SampleGroup] = []
        filling: set[str] | None = None  # requests whose prompt is being prefilled; known once it matters
        while (group := self._turn(passed)) is not None:
            request_id = (group.fresh or group.resumed)[0].request.id
            shared = self._prompts.get(request_id)
            if group.unfinished > 1 and filling is None:
                filling = {sample.request.id for sample in self.running if fills(sample)}
            queue = group.queue(fresh_too=shared is not None or filling is None or request_id not in filling)
            if queue is None:
                passed.append(group)
                continue
            if (len(self.running) >= self.max_batch or not self.cache.free_slots) and not self._make_place(group.client):
                break
            sample = queue[0]
            if shared is not None and queue is group.fresh:
                sample.block_table = self.cache.fork(shared.table)
                if shared.experts is not None:
                    sample.record_experts(0, shared.experts)
            elif self.cache.free_pages >= self.cache.pages_for(sample.anchor + 1) or not self.running:
                sample.block_table = self.cache.open()
                if filling is not None:
                    filling.add(request_id)
            if sample.block_table is None:
                if self._make_place(group.client):
                    continue
                break
            queue.popleft()
            self._waiting_samples -= 1
            self.running.append(sample)
            if not group.waits:
                self._waiting.remove(group)

    def _reuse(self, sample: Sample) -> None:
        """Let a sample that has not begun its prefill begin behind what the cache keeps. A sample that records experts runs every
        row."""
        table = sample.block_table
        if table is None or len(table.pages) or not self.prefix_caching or sample.experts is not None:
            return
        found = self.cache.reuse(table, sample.tokens, sample.anchor, sample.request.cache_salt.encode())
        self.cached_tokens += found
        if found and sample.prefilled:
            self.prefilled(sample)

    def _keep(self, sample: Sample) -> None:
        if self.prefix_caching and sample.block_table is not None:
            self.cache.keep(sample.block_table, sample.tokens, sample.request.cache_salt.encode())

    def _make_room(self, sample: Sample, positions: int) -> bool:
        """Reserve pages. Where they lack, free the shared prompts first, then preempt the youngest samples. False when the sample
        itself was preempted."""
        assert sample.block_table is not None
        while not self.cache.reserve(sample.block_table, positions):
            if self._prompts:
                self._forget_prompt(next(iter(self._prompts)))
                continue
            last = youngest(self.running)
            self._preempt(last)
            if last is sample:
                return False
        return True

    def _preempt(self, sample: Sample) -> None:
        """Make a running sample wait. It keeps its drafts, so its tokens stay what they would have been."""
        self._release(sample)
        sample.own_drafts()
        self.preemptions += 1
        self._wait(sample)

    def _turn(self, passed: list[SampleGroup]) -> SampleGroup | None:
        """The waiting group that is next but for those passed over."""
        if len(self._clients) > 1:
            return next_group(self._waiting, passed, self.running)
        # With one client the groups passed over are the oldest.
        return self._waiting[len(passed)] if len(passed) < len(self._waiting) else None

    def _make_place(self, client: str) -> bool:
        """Preempt a sample of a client that is above its share; False where there is none."""
        sample = above_share(self.running, client) if len(self._clients) > 1 else None
        if sample is not None:
            self._preempt(sample)
        return sample is not None

    def _wait(self, sample: Sample) -> None:
        """Put the sample into its group's queue, and the group among those that wait."""
        group = self._groups[sample.request.id]
        if not group.waits:
            if not self._waiting or self._waiting[-1].arrival < group.arrival:
                self._waiting.append(group)
            else:  # A preempted sample is older than all groups but those that wait for a sibling's prompt.
                place = next(i for i, other in enumerate(self._waiting) if other.arrival > group.arrival)
                self._waiting.insert(place, group)
        group.wait(sample)
        self._waiting_samples += 1

    def _release(self, sample: Sample) -> None:
        assert sample.block_table is not None
        self._latest = None
        self.running.remove(sample)
        self._keep(sample)
        self.cache.release(sample.block_table)
        sample.block_table = None

    def _forget_prompt(self, request_id: str) -> None:
        prompt = self._prompts.pop(request_id, None)
        if prompt is not None:
            self.cache.release(prompt.table)
