"""What a search is about and what it returns: questions, candidates, results.

This module imports neither torch nor Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .spending import Spent


@dataclass(frozen=True, slots=True)
class Question:
    """What is searched for.

    Attributes:
        id: its name; with the search's seed it decides what is sampled.
        prompt_tokens: token ids.
        prompt: the prompt's text, which a scorer is given.
        verifier: text -> score, for the scorer `verifier`.
    """

    id: str
    prompt_tokens: tuple[int, ...]
    prompt: str = ""
    verifier: Callable[[str], float] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One sample as a search sees it.

    Attributes:
        tokens: token ids that were generated, and those that a method has put between.
        logprob: sum of log p over the generated ones, at the sampling temperature. count: how many these are.
        finished: it ended by itself, not by a limit.
        text, answer: what the tokens say, and the canonical answer in it; an unfinished candidate has no answer.
        score: what the scorer makes of it; None where nothing was scored.
    """

    tokens: tuple[int, ...]
    logprob: float
    count: int
    finished: bool
    text: str
    answer: str | None
    score: float | None = None

    @property
    def mean_logprob(self) -> float:
        """Mean of log p over the generated tokens."""
        return self.logprob / max(self.count, 1)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a method decides.

    Attributes:
        chosen: the candidate whose text is the result; None where there is none.
        votes: weight of each answer, in the order in which they were seen.
        candidates: all that the decision looked at, in order.
        reason: why sampling ended: `done`, or what stopped it early (`certain`, `sure`, `budget_tokens`, `budget_seconds`,
            `aborted` by somebody else).
    """

    chosen: Candidate | None
    candidates: Sequence[Candidate]
    votes: Mapping[str, float] = field(default_factory=dict)
    reason: str = "done"


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The result of one search.

    Attributes:
        id: of the question. method: of the search.
        answer, text: of the chosen candidate; None where no candidate has one.
        verdict: how it was decided. spent: what it cost.
    """

    id: str
    method: str
    verdict: Verdict
    spent: Spent

    @property
    def answer(self) -> str | None:
        """The answer."""
        return None if self.verdict.chosen is None else self.verdict.chosen.answer

    @property
    def text(self) -> str | None:
        """The chosen candidate's text."""
        return None if self.verdict.chosen is None else self.verdict.chosen.text

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        chosen = self.verdict.chosen
        return {
            "id": self.id, "method": self.method, "answer": self.answer, "text": self.text,
            "logprob": None if chosen is None else chosen.logprob, "score": None if chosen is None else chosen.score,
            "votes": dict(self.verdict.votes), "candidates": len(self.verdict.candidates), "reason": self.verdict.reason,
            "spent": self.spent.as_dict(),
        }  # fmt: skip
