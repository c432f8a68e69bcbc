"""Who runs next: admission in order of arrival, prompt sharing inside a group, chunked prefill, preemption.

Invariants:
- Order is by arrival and sample number alone, so a batch submitted whole is always served the same way.
- A running sample has pages for everything the coming step may write. When the pool is empty the youngest sample waits;
  the oldest never does, so every sample ends.
- The step that prefills the last rows of a prompt decodes it too: no weight is read for a prompt alone.
"""

from __future__ import annotations

import heapq

from .cache import Held, PagedCache
from .sequence import Sample, Turn


class Scheduler:
    """Waiting and running samples.

    Args:
        max_batch: most samples running at once.
        prefill_rows: most prompt rows of one step over all samples.
    """

    def __init__(self, cache: PagedCache, max_batch: int, prefill_rows: int) -> None:
        self.cache, self.max_batch, self.prefill_rows = cache, max_batch, prefill_rows
        self.running: list[Sample] = []
        self._waiting: list[tuple[int, int, Sample]] = []
        self._prompts: dict[str, Held] = {}
        self._unfinished: dict[str, int] = {}
        self.preemptions = 0

    @property
    def pending(self) -> int:
        """Samples not finished."""
        return len(self.running) + len(self._waiting)

    def serves(self, request_id: str) -> bool:
        """Whether a sample of the request is not finished."""
        return request_id in self._unfinished

    def add(self, sample: Sample) -> None:
        """Queue a sample."""
        self._unfinished[sample.request.id] = self._unfinished.get(sample.request.id, 0) + 1
        self._wait(sample)

    def clear(self) -> list[Sample]:
        """Give up every sample, and return them, oldest first. Nothing is in use afterwards, also where an exception stopped a
        step half way."""
        given_up = sorted([*self.running, *(s for *_, s in self._waiting)], key=lambda s: (s.arrival, s.number))
        for sample in given_up:
            sample.held = sample.drafts = None
        self.running.clear()
        self._waiting.clear()
        self._prompts.clear()
        self._unfinished.clear()
        self.cache.release_all()
        return given_up

    def retire(self, sample: Sample) -> None:
        """A finished sample gives its place back, and its drafts."""
        self._give_up(sample)
        sample.drafts = None
        self._unfinished[sample.request.id] -= 1
        if not self._unfinished[sample.request.id]:
            del self._unfinished[sample.request.id]
        if not any(s.request.id == sample.request.id for *_, s in self._waiting):
            self._forget_prompt(sample.request.id)

    def next(self, rows: int) -> list[Turn]:
        """The coming step, oldest sample first.

        Args:
            rows: most positions a decode step writes per sample, the anchor included.
        """
        self._admit()
        step: list[Turn] = []
        budget = self.prefill_rows
        for sample in sorted(self.running, key=lambda s: (s.arrival, s.number)):
            if sample.held is None:
                continue
            missing = sample.anchor - sample.held.length
            chunk = min(missing, budget)
            if missing and not chunk:
                continue
            decodes = chunk == missing
            target = sample.anchor + min(rows, sample.remaining + 1) if decodes else sample.held.length + chunk
            if self._make_room(sample, target):
                budget -= chunk
                step.append(Turn(sample, chunk, decodes))
        return [turn for turn in step if turn.sample.held is not None]

    def prefilled(self, sample: Sample) -> None:
        """Called when a sample's prompt is in the cache: siblings that still wait may share it."""
        request = sample.request
        waits = any(s.request.id == request.id for *_, s in self._waiting)
        if waits and request.id not in self._prompts and len(sample.tokens) == len(request.prompt_tokens):
            assert sample.held is not None
            copy = self.cache.fork(sample.held)
            if copy is not None:
                self._prompts[request.id] = copy

    def forget_prompts(self) -> None:
        """Shared prompts are of an old weight version."""
        for request_id in list(self._prompts):
            self._forget_prompt(request_id)

    def recompute(self) -> None:
        """Every running sample prefills again."""
        for sample in self.running:
            assert sample.held is not None
            self.cache.release(sample.held)
            sample.held = self.cache.open()
            sample.own_drafts()

    def _admit(self) -> None:
        filling = {s.request.id for s in self.running if not s.prefilled}
        later = []
        while self._waiting and len(self.running) < self.max_batch and self.cache.free_slots:
            entry = heapq.heappop(self._waiting)
            sample = entry[2]
            shared = self._prompts.get(sample.request.id)
            fresh = len(sample.tokens) == len(sample.request.prompt_tokens)
            if fresh and shared is None and sample.request.id in filling:
                later.append(entry)  # a sibling is about to bring the prompt
                continue
            if fresh and shared is not None:
                sample.held = self.cache.fork(shared)
            elif self.cache.free_pages >= self.cache.pages_for(sample.anchor + 1) or not self.running:
                sample.held = self.cache.open()
                filling.add(sample.request.id)
            if sample.held is None:
                later.append(entry)
                break
            self.running.append(sample)
        for entry in later:
            heapq.heappush(self._waiting, entry)

    def _make_room(self, sample: Sample, positions: int) -> bool:
        """Reserve pages, first from shared prompts, then from the youngest samples; False when it had to wait itself."""
        assert sample.held is not None
        while not self.cache.reserve(sample.held, positions):
            if self._prompts:
                self._forget_prompt(next(iter(self._prompts)))
                continue
            youngest = max(self.running, key=lambda s: (s.arrival, s.number))
            self._give_up(youngest)
            youngest.own_drafts()
            self.preemptions += 1
            self._wait(youngest)
            if youngest is sample:
                return False
        return True

    def _wait(self, sample: Sample) -> None:
        heapq.heappush(self._waiting, (sample.arrival, sample.number, sample))

    def _give_up(self, sample: Sample) -> None:
        assert sample.held is not None
        self.running.remove(sample)
        self.cache.release(sample.held)
        sample.held = None

    def _forget_prompt(self, request_id: str) -> None:
        held = self._prompts.pop(request_id, None)
        if held is not None:
            self.cache.release(held)
