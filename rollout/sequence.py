"""One sample while it is generated: tokens, log-probabilities, drafts, block table; and its part in a step.

Invariants:
- The log has an entry for each generated token.
- A preempted sample keeps its drafts, so that preemption changes neither its tokens nor their distribution.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..seeds import sample_seed
from .cache import BlockTable
from .prompt_logprobs import PromptLogprobs
from .sample_log import SampleLog
from .sampling.drafts import Drafts
from .stop_strings import StopStrings
from .types import FinishReason, RolloutRequest, StepTrace, Trajectory


@dataclass(eq=False, slots=True)
class Sample:
    """Sample `number` of a request.

    Attributes:
        limit: most tokens the sample may reach, prompt included.
        tokens: prompt and generated tokens.
        stops: tokens that end the sample.
        arrival: number of the request, in the order of arrival.
        client: whose request it is; clients share an engine fairly.
        prompt_logprobs: the prompt's, shared by the samples of a request; None where they are not wanted.
        age: sorts samples, oldest first. seed: of its random numbers. takes_drafts: its sampler verifies drafts.
        block_table: where it lies in the cache; None while it waits.
        drafts: a batch of drafts, of which row `draft_index` holds the sample's own `draft_count` drafts; None when it has none.
        draft_start, draft_length: first position and length of the mask block those drafts came from.
        log: what its steps gave (`SampleLog`): log-probabilities, versions, trace.
        experts: int16[limit, L], the expert per row and layer; None unless they are recorded.
        forwards: forward passes of its decode steps.
        stop_strings: finds the token that completes a stop string; None where there are none.
        stop_reason: the token or the string that ended it; None where neither did.
        top: the most probable tokens at each generated token, and their log-probabilities; empty where they are not wanted.
    """

    request: RolloutRequest
    number: int
    limit: int
    tokens: list[int]
    stops: frozenset[int]
    arrival: int
    client: str = ""
    prompt_logprobs: PromptLogprobs | None = None
    age: tuple[int, int] = field(init=False)
    seed: int = field(init=False)
    takes_drafts: bool = field(init=False)
    block_table: BlockTable | None = None
    drafts: Drafts | None = None
    draft_index: int = 0
    draft_count: int = 0
    draft_start: int = -1
    draft_length: int = 0
    log: SampleLog = field(default_factory=SampleLog)
    experts: np.ndarray | None = None
    forwards: int = 0
    finish: FinishReason | None = None
    stop_reason: int | str | None = None
    stop_strings: StopStrings | None = None
    top: list[tuple[list[int], list[float]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.age = self.arrival, self.number
        self.takes_drafts = self.request.params.sampler != "ar"
        self.seed = sample_seed(self.request.seed, self.number)

    @property
    def anchor(self) -> int:
        """Position of the last committed token."""
        return len(self.tokens) - 1

    @property
    def prefilled(self) -> bool:
        """Everything before the anchor is in the cache."""
        return self.block_table is not None and self.block_table.length == self.anchor

    @property
    def cached(self) -> int:
        """Positions in the cache. The sample must be running."""
        assert self.block_table is not None
        return self.block_table.length

    @property
    def remaining(self) -> int:
        """Tokens it may still generate."""
        return self.limit - len(self.tokens)

    def own_drafts(self) -> None:
        """Copy its own drafts out of their batch, so that a waiting sample does not keep the whole batch in memory."""
        if self.drafts is not None:
            self.drafts = self.drafts.row(self.draft_index, self.draft_count) if self.draft_count else None
            self.draft_index = 0

    def keep_drafts(self, drafts: Drafts | None, index: int, count: int, start: int, length: int) -> None:
        """Take the drafts of the next step: `count` of them in row `index`, from the mask block of `length` at `start`."""
        self.drafts, self.draft_index, self.draft_count = drafts, index, count
        self.draft_start, self.draft_length = start, length

    @property
    def trace(self) -> list[StepTrace]:
        """One entry per decode step."""
        return self.log.settle().trace

    @property
    def last_step(self) -> StepTrace:
        """The last entry of `trace`."""
        return self.log.last

    def commit(self, accepted: int, tokens: list[int]) -> int:
        """Append one step's tokens, `accepted` drafts and one more, up to the first token that ends the sample.

        Returns: how many.
        """
        remaining = self.limit - len(self.tokens)
        count = accepted + 1 if accepted < remaining else remaining
        taken = tokens[:count]
        if not self.stops.isdisjoint(taken):
            count = 1
            while taken[count - 1] not in self.stops:
                count += 1
            taken = taken[:count]
            self.finish, self.stop_reason = "stop", taken[-1]
        elif count == remaining:
            self.finish = "length"
        if self.stop_strings is not None and (found := self.stop_strings.first(self.tokens, taken)) is not None:
            count, self.finish, self.stop_reason = found[0], "stop", found[1]
            taken = taken[:count]
        self.tokens += taken
        return count

    def record_top(self, token_RK: list[list[int]], logprob_RK: list[list[float]]) -> None:
        """Keep the most probable tokens beside the tokens that the last `commit` took."""
        k, new = self.request.params.alternatives, len(self.tokens) - len(self.request.prompt_tokens) - len(self.top)
        if k:
            self.top += [(token_RK[i][:k], logprob_RK[i][:k]) for i in range(new)]

    def record_experts(self, position: int, expert_RL: np.ndarray) -> None:
        """Record the experts of the clean rows from `position` on."""
        assert self.experts is not None
        self.experts[position : position + len(expert_RL)] = expert_RL[: max(len(self.experts) - position, 0)]

    def trajectory(self) -> Trajectory:
        """The finished sample."""
        assert self.finish is not None
        params, prompt, log = self.request.params, len(self.request.prompt_tokens), self.log.settle()
        scores = None if self.prompt_logprobs is None or self.finish == "abort" else self.prompt_logprobs.scores
        alternatives = [np.array(part) for part in zip(*self.top, strict=True)] if self.top else []
        cut = params.temperature > 0 and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)
        return Trajectory(
            request_id=self.request.id,
            sample=self.number,
            prompt_tokens=self.request.prompt_tokens,
            tokens=self.tokens[prompt:],
            logprobs=log.numbers_3N[0],
            behavior_logprobs=log.numbers_3N[1],
            versions=np.array(log.versions, dtype=np.int32),
            from_draft=np.frombuffer(log.from_draft, dtype=bool),
            finish_reason=self.finish,
            forwards=self.forwards,
            trace=tuple(log.trace),
            support_logmass=log.numbers_3N[2] if cut else None,
            routed_experts=None if self.experts is None else self.experts[: len(self.tokens) - 1],
            stop_reason=self.stop_reason,
            stop_included=params.include_stop_str_in_output,
            top_tokens=alternatives[0].astype(np.int32) if alternatives else None,
            top_logprobs=alternatives[1].astype(np.float32) if alternatives else None,
            prompt_logprobs=None if scores is None else scores.logprobs,
            prompt_top_tokens=None if scores is None else scores.top_tokens,
            prompt_top_logprobs=None if scores is None else scores.top_logprobs,
        )


class ScheduledSample(NamedTuple):
    """A sample's part in one step.

    Attributes:
        chunk: prompt rows that it prefills.
        decodes: whether it decodes; then the chunk is the last part of its prompt that the cache lacks.
    """

    sample: Sample
    chunk: int
    decodes: bool


class SchedulerOutput(NamedTuple):
    """The samples of one step, oldest first.

    Attributes:
        scheduled: S samples.
        decoding: D of them, which decode. decoding_index: their places in `scheduled`.
        prefills: whether any prompt rows run.
        records_experts: whether any sample records experts.
    """

    scheduled: list[ScheduledSample]
    decoding: list[Sample]
    decoding_index: list[int]
    prefills: bool
    records_experts: bool

    @classmethod
    def of(cls, scheduled: list[ScheduledSample]) -> SchedulerOutput:
        """The step of these samples."""
        decoding: list[Sample] = []
        index, prefills, records = [], False, False
        for s, (sample, chunk, decodes) in enumerate(scheduled):
            if decodes:
                decoding.append(sample)
                index.append(s)
            prefills = prefills or chunk > 0
            records = records or sample.experts is not None
        return cls(scheduled, decoding, index, prefills, records)

    def alone(self, index: Iterable[int]) -> SchedulerOutput:
        """A step that only decodes these of its D samples."""
        return SchedulerOutput.of([ScheduledSample(self.decoding[d], 0, True) for d in index])
