"""Best of n: the sample with the highest score.

    chosen = argmax_i score(prompt, sample_i)

Scores: a verifier (Cobbe et al. 2021, arXiv 2110.14168), or the policy's own: the sum of its log-probabilities, log p(sample),
or their mean over tokens, which does not favour short samples. Finished samples come before others; of equal scores the first
wins.
"""

from __future__ import annotations

from .candidates import Verdict
from .context import Method, Search


def best_of_n(search: Search) -> Method:
    """Every sample is scored once it is whole."""
    candidates = yield from search.candidates(search.config.samples)
    candidates = [search.scored(candidate) for candidate in candidates]
    chosen = max(candidates, key=lambda c: (c.finished, c.score), default=None)
    return Verdict(chosen, candidates, reason=search.reason())
