"""pass@k and majority@k against every subset."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest

from blockroll.rollout.search.estimators import majority_at_k, pass_at_k


@pytest.mark.parametrize("samples,right", [(1, 0), (1, 1), (5, 0), (5, 2), (6, 6), (7, 3)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(samples: int, right: int) -> None:
    marks = [True] * right + [False] * (samples - right)
    for k in range(1, samples + 1):
        subsets = list(combinations(marks, k))
        assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("answers,right", [
    ("a", "a"), ("aab", "a"), ("aabb", "b"), ("abc--", "c"), ("--", ""), ("aaabbbc-", "a"), ("aabbccd", "ac"),
    ("aaaabbbbcc--", "b"),
])  # fmt: skip
def test_majority_at_k_is_the_share_of_subsets_whose_vote_is_right(answers: str, right: str) -> None:
    """`-`: no answer. Of answers with equally many votes each wins with the same chance."""
    votes = Counter(answers.replace("-", ""))
    for k in range(1, len(answers) + 1):
        shares = []
        for subset in combinations(answers, k):
            counts = Counter(a for a in subset if a != "-")
            top = [a for a in counts if counts[a] == max(counts.values())]
            shares.append(sum(a in right for a in top) / len(top) if top else 0.0)
        assert majority_at_k(votes, right, len(answers), k) == pytest.approx(sum(shares) / len(shares))
