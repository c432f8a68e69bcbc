"""pass@k and majority@k of n samples: what k of them, drawn without replacement, are expected to give.

pass@k = 1 - C(n - c, k) / C(n, k), with c right samples of n (Chen et al. 2021, arXiv 2107.03374).

majority@k = E[the most frequent answer of k samples is right] (self-consistency, Wang et al. 2022, arXiv 2203.11171), where
equally frequent answers win with equal chance. Over all C(n, k) draws, with n_x samples of answer x, k_x of them drawn:

    majority@k = sum over right x and c >= 1 of  C(n_x, c) * ways(c) / C(n, k)
    ways(c)    = sum over t of  #{k_y <= c for all y != x, exactly t of them equal to c, in all k - c drawn} / (1 + t)

Samples without an answer are drawn like others and vote for nothing. Both are unbiased for k fresh samples. Counts are exact
integers, so nothing is rounded before the last division.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping
from fractions import Fraction
from typing import TypeVar

Answer = TypeVar("Answer", bound=Hashable)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that k of the samples, drawn without replacement, hold a right one. 1 <= k <= samples."""
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def majority_at_k(votes: Mapping[Answer, int], right: Collection[Answer], samples: int, k: int) -> float:
    """The chance that the most frequent answer of k of the samples, drawn without replacement, is right.

    Args:
        votes: how many of the samples gave each answer.
        right: the right answers among them.
        samples: all samples, those without an answer included. 1 <= k <= samples.
    """
    silent = samples - sum(votes.values())
    total = Fraction(0)
    for answer in votes:
        if answer not in right:
            continue
        others = [count for other, count in votes.items() if other != answer]
        for c in range(1, min(votes[answer], k) + 1):
            total += math.comb(votes[answer], c) * _ways(others, silent, k - c, c)
    return float(total / math.comb(samples, k))


def _ways(others: list[int], silent: int, drawn: int, most: int) -> Fraction:
    """Weighted number of ways to draw `drawn` samples of other answers, and of none, with at most `most` of each other answer. A
    way in which t answers have `most` counts 1 / (1 + t)."""
    states = {(0, 0): 1}  # (drawn so far, answers that tie) -> ways
    for count in others:
        following: dict[tuple[int, int], int] = {}
        for (so_far, ties), ways in states.items():
            for taken in range(min(count, most, drawn - so_far) + 1):
                key = so_far + taken, ties + (taken == most)
                following[key] = following.get(key, 0) + ways * math.comb(count, taken)
        states = following
    return sum((Fraction(ways * math.comb(silent, drawn - so_far), 1 + ties)
                for (so_far, ties), ways in states.items() if drawn - so_far <= silent), Fraction(0))
