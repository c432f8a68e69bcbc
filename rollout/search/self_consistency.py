"""A majority vote that stops once more samples would not change it.

Three rules, with v_1 votes for the leader, v_2 for the next, r samples left:

- `certain`: no outcome of the r samples gives another winner. The same answer as the whole vote, always. Part of every rule.
- `beta`: P(p_1 > p_2 | v_1, v_2) >= confidence, p_1 / (p_1 + p_2) ~ Beta(v_1 + 1, v_2 + 1):
      P = sum_{k=0..v_1} C(v_1 + v_2 + 1, k) / 2^(v_1 + v_2 + 1)
- `dirichlet`: P(p_1 > max_{i>1} p_i | v) >= confidence, p ~ Dirichlet(v_i + 1) over the answers seen and one for all unseen ones:
      P = int_0^inf g(x; v_1 + 1) prod_{i>1} G(x; v_i + 1) dx,   g, G: density and distribution of Gamma(a, 1)

Source: Adaptive-Consistency, Aggarwal et al. 2023, arXiv 2305.11860, whose default is `beta` at 0.95.

Samples are taken in waves. A wave is as large as it can be without ever taking a sample that one-by-one sampling would not
take: as many as the leader would need, if all were for it, before a rule could hold; at most WAVE.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from .candidates import Candidate
from .config import MAX_SAMPLES
from .context import WAVE, Method, Search
from .votes import tally, verdict, winner

_GRID, _REACH = 4097, 12.0
"""Points of the integral, and how many standard deviations past the leader's mean it reaches."""


def cannot_change(votes: Mapping[str, float], left: int) -> bool:
    """Whether no outcome of `left` more votes gives another winner. `votes` in the order in which answers were seen."""
    leader = winner(votes)
    if leader is None:
        return left == 0
    names = list(votes)
    first = names.index(leader)
    ahead = votes[leader]
    # An answer that was seen before the leader wins a tie; any other, and one not seen yet, needs one vote more.
    seen = all(votes[name] + left < ahead + (i > first) for i, name in enumerate(names) if name != leader)
    return seen and left <= ahead


def beta_posterior(first: int, second: int) -> float:
    """P(p_1 > p_2) after so many votes for each, as above."""
    total = first + second + 1
    return sum(math.comb(total, k) for k in range(first + 1)) / 2**total


def dirichlet_posterior(first: int, others: Sequence[int]) -> float:
    """P(p_1 is the largest) after so many votes, as above. `others` includes a 0 for what was not seen."""
    top = first + 1 + _REACH * math.sqrt(max(first + 1, *(v + 1 for v in others))) + _REACH
    x = np.linspace(0.0, top + max(others), _GRID)
    with np.errstate(divide="ignore"):
        logs = np.log(x)
    value = _density(x, logs, first + 1)
    for votes in others:
        value = value * _distribution(x, logs, votes + 1)
    step = x[1] - x[0]
    return float(min(step / 3 * (value[0] + value[-1] + 4 * value[1:-1:2].sum() + 2 * value[2:-1:2].sum()), 1.0))


def _density(x: np.ndarray, logs: np.ndarray, shape: int) -> np.ndarray:
    """Of Gamma(shape, 1), for whole shapes."""
    power = np.where(x > 0, (shape - 1) * logs, 0.0 if shape == 1 else -np.inf) if shape > 1 else np.zeros_like(x)
    return np.exp(power - x - math.lgamma(shape))


def _distribution(x: np.ndarray, logs: np.ndarray, shape: int) -> np.ndarray:
    """1 - e^-x sum_{k<shape} x^k / k!."""
    return 1.0 - sum((_density(x, logs, k + 1) for k in range(shape)), np.zeros_like(x))


def stops(votes: Mapping[str, float], left: int, rule: str, confidence: float) -> str | None:
    """Why sampling may end: `certain`, `sure`, or None."""
    if cannot_change(votes, left):
        return "certain"
    if rule == "certain" or not votes:
        return None
    first, *others = sorted((int(count) for count in votes.values()), reverse=True)
    if rule == "beta":
        sure = beta_posterior(first, others[0] if others else 0)
    else:
        sure = dirichlet_posterior(first, [*others, 0])
    return "sure" if sure >= confidence else None


def least_more(votes: Mapping[str, float], left: int, rule: str, confidence: float, most: int = WAVE) -> int:
    """The fewest further samples after which a rule can hold: those that all go to the leader. At least 1, at most `left` and
    `most`."""
    leader = winner(votes)
    name = "" if leader is None else leader
    for more in range(1, min(left, most)):
        if stops({**votes, name: votes.get(name, 0.0) + more}, left - more, rule, confidence):
            return more
    return min(left, most)


def self_consistency(search: Search) -> Method:
    """Votes come in waves until a rule holds, all samples are used, or the budget is out."""
    config = search.config
    most = MAX_SAMPLES if config.samples is None else config.samples
    candidates: list[Candidate] = []
    votes: dict[str, float] = {}
    used, reason = 0, None
    while used < most and reason is None:
        wave = least_more(votes, most - used, config.stop_rule, config.confidence)
        found = yield from search.sample([search.question.prompt_tokens] * wave)
        candidates += [search.candidate(found[place]) for place in sorted(found)]
        votes, used = tally(candidates), used + wave
        if len(found) < wave:
            return verdict(search, candidates, votes, search.reason())
        if used < most:
            reason = stops(votes, most - used, config.stop_rule, config.confidence)
    return verdict(search, candidates, votes, reason or search.reason())
