"""Majority vote and weighted vote over independent samples.

    winner = argmax_a sum_i w_i [answer_i = a]

Majority (self-consistency, Wang et al. 2022, arXiv 2203.11171): w_i = 1. Weighted: w_i is the sample's probability under the
policy (scorer `logprob`), its geometric mean over the tokens (`mean_logprob`, the "normalized weighted sum" of the same
paper), or what a verifier or function says (Li et al. 2022, arXiv 2206.02336). Of answers with equal weight the one that was
seen first wins. Samples without an answer vote for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from .candidates import Candidate, Verdict
from .context import LOGPROBS, Method, Search


def tally(candidates: Iterable[Candidate], weight: Callable[[Candidate], float] = lambda candidate: 1.0) -> dict[str, float]:
    """Weight of each answer, in the order in which answers were first seen."""
    votes: dict[str, float] = {}
    for candidate in candidates:
        if candidate.answer is not None:
            votes[candidate.answer] = votes.get(candidate.answer, 0.0) + weight(candidate)
    return votes


def winner(votes: Mapping[str, float]) -> str | None:
    """The answer with the largest weight, the first of several; None where nobody voted."""
    return max(votes, key=votes.__getitem__, default=None)


def verdict(search: Search, candidates: list[Candidate], votes: Mapping[str, float], reason: str) -> Verdict:
    """The vote's result; its text is that of the most probable sample with the winning answer."""
    answer = winner(votes)
    chosen = max((c for c in candidates if answer is not None and c.answer == answer), key=lambda c: c.logprob, default=None)
    return Verdict(chosen, candidates, votes, reason)


def majority(search: Search) -> Method:
    """Every sample has one vote."""
    candidates = yield from search.candidates(search.config.samples)
    return verdict(search, candidates, tally(candidates), search.reason())


def weighted_vote(search: Search) -> Method:
    """Every sample votes with the weight that the scorer gives."""
    candidates = yield from search.candidates(search.config.samples)
    candidates = [search.scored(candidate) for candidate in candidates]
    # Probabilities of long samples are too small for a float, so they are compared as multiples of the largest one.
    scores = [c.score for c in candidates if c.answer is not None and c.score is not None]
    best = max(scores, default=0.0) if search.config.scorer in LOGPROBS else 0.0
    decided = verdict(search, candidates, tally(candidates, lambda c: search.weight(c, best)), search.reason())
    return replace(decided, votes={name: votes * math.exp(best) for name, votes in decided.votes.items()})
