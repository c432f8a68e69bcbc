"""One sample being made: its tokens, its record, its drafts, its place in the cache, and its part in a step.

Invariants: `record` entries and generated tokens have the same length; a preempted sample keeps its drafts, so that
preemption changes neither its tokens nor their distribution.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .cache import Held
from .prompt_logprobs import PromptLogprobs
from .sampling.drafts import Drafts
from .seeds import sample_seed
from .stop_strings import StopStrings
from .types import FinishReason, RolloutRequest, StepTrace, Trajectory


@dataclass
class Sample:
    """Sample number `number` of `request`.

    Attributes:
        tokens: prompt and generated tokens.
        limit: most tokens `tokens` may reach.
        held: its place in the cache; None while it waits.
        drafts, draft_index: the batch of drafts its own drafts are row `draft_index` of; None when it has none.
        draft_start, draft_length: the mask block those drafts came from.
        stop_strings: finds the token that completes a stop string; None where there are none.
        prompt_logprobs: the prompt's, shared by the samples of a request; None where they are not wanted.
    """

    request: RolloutRequest
    number: int
    limit: int
    tokens: list[int]
    stops: frozenset[int]
    arrival: int
    seed: int = 0
    held: Held | None = None
    drafts: Drafts | None = None
    draft_index: int = 0
    draft_count: int = 0
    draft_start: int = -1
    draft_length: int = 0
    logprobs: list[float] = field(default_factory=list)
    behavior: list[float] = field(default_factory=list)
    support: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    from_draft: list[bool] = field(default_factory=list)
    trace: list[StepTrace] = field(default_factory=list)
    experts: np.ndarray | None = None
    forwards: int = 0
    finish: FinishReason | None = None
    stop_reason: int | str | None = None
    stop_strings: StopStrings | None = None
    prompt_logprobs: PromptLogprobs | None = None
    top: list[tuple[list[int], list[float]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.seed = sample_seed(self.request.seed, self.number)

    @property
    def anchor(self) -> int:
        """Position of the last committed token."""
        return len(self.tokens) - 1

    @property
    def prefilled(self) -> bool:
        """Everything before the anchor is in the cache."""
        return self.held is not None and self.held.length == self.anchor

    @property
    def remaining(self) -> int:
        """Tokens it may still generate."""
        return self.limit - len(self.tokens)

    def own_drafts(self) -> None:
        """Copy its own drafts out of the batch they are in, so that a sample that waits does not keep the q of all of it."""
        if self.drafts is not None:
            self.drafts = self.drafts.row(self.draft_index, self.draft_count) if self.draft_count else None
            self.draft_index = 0

    def commit(
        self,
        accepted: int,
        tokens: list[int],
        logprobs: list[float],
        behavior: list[float],
        support: list[float],
        version: int,
    ) -> None:
        """Take one step's tokens, `accepted` drafts and one more, up to the first that ends the sample."""
        count = min(accepted + 1, self.remaining)
        taken = tokens[:count]
        if not self.stops.isdisjoint(taken):
            count, self.finish = 1 + next(i for i, token in enumerate(taken) if token in self.stops), "stop"
            taken = taken[:count]
            self.stop_reason = taken[-1]
        elif count == self.remaining:
            self.finish = "length"
        if self.stop_strings is not None and (found := self.stop_strings.first(self.tokens, taken)) is not None:
            count, self.finish, self.stop_reason = found[0], "stop", found[1]
            taken = taken[:count]
        self.tokens += taken
        self.logprobs += logprobs[:count]
        self.behavior += behavior[:count]
        self.support += support[:count]
        self.from_draft += [True] * min(accepted, count) + [False] * (count - accepted)
        self.versions += [version] * count

    def record_top(self, token_RK: list[list[int]], logprob_RK: list[list[float]]) -> None:
        """Keep the most probable tokens beside the tokens that the last `commit` took."""
        k, new = self.request.params.logprobs or 0, len(self.logprobs) - len(self.top)
        if k:
            self.top += [(token_RK[i][:k], logprob_RK[i][:k]) for i in range(new)]

    def record_experts(self, position: int, expert_RL: np.ndarray) -> None:
        """Keep the experts of clean rows at `position` and after."""
        assert self.experts is not None
        self.experts[position : position + len(expert_RL)] = expert_RL[: max(len(self.experts) - position, 0)]

    def trajectory(self) -> Trajectory:
        """The finished sample."""
        assert self.finish is not None
        params, prompt = self.request.params, len(self.request.prompt_tokens)
        scores = None if self.prompt_logprobs is None or self.finish == "abort" else self.prompt_logprobs.scores
        alternatives = [np.array(part) for part in zip(*self.top, strict=True)]
        cut = params.temperature > 0 and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)
        return Trajectory(
            request_id=self.request.id,
            sample=self.number,
            prompt_tokens=self.request.prompt_tokens,
            tokens=self.tokens[prompt:],
            logprobs=np.array(self.logprobs, dtype=np.float32),
            behavior_logprobs=np.array(self.behavior, dtype=np.float32),
            versions=np.array(self.versions, dtype=np.int32),
            from_draft=np.array(self.from_draft, dtype=bool),
            finish_reason=self.finish,
            forwards=self.forwards,
            trace=tuple(self.trace),
            support_logmass=np.array(self.support, dtype=np.float32) if cut else None,
            routed_experts=None if self.experts is None else self.experts[: len(self.tokens) - 1],
            stop_reason=self.stop_reason,
            stop_included=params.include_stop_str_in_output,
            top_tokens=alternatives[0].astype(np.int32) if alternatives else None,
            top_logprobs=alternatives[1].astype(np.float32) if alternatives else None,
            prompt_logprobs=None if scores is None else scores.logprobs,
            prompt_top_tokens=None if scores is None else scores.top_tokens,
            prompt_top_logprobs=None if scores is None else scores.top_logprobs,
        )


class Turn(NamedTuple):
    """A sample's part in a step: `chunk` prompt rows that it prefills, and whether it decodes, for which they must be the last
    that its cache lacks."""

    sample: Sample
    chunk: int
    decodes: bool
