"""When a vote stops: certainty against every outcome, posteriors against their definitions, waves against one by one."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from blockroll.rollout.search.self_consistency import (
    beta_posterior,
    cannot_change,
    dirichlet_posterior,
    least_more,
    stops,
)
from blockroll.rollout.search.votes import winner


def counted(answers: tuple[str, ...] | str) -> dict[str, float]:
    """Votes in the order in which answers are seen; `-` is a sample without one."""
    votes: dict[str, float] = {}
    for answer in answers:
        if answer != "-":
            votes[answer] = votes.get(answer, 0.0) + 1
    return votes


def test_cannot_change_is_true_exactly_where_no_outcome_has_another_winner() -> None:
    checked = 0
    for seen in range(6):
        for answers in product("ab-", repeat=seen):
            for left in range(5):
                now = winner(counted(answers))
                outcomes = {winner(counted((*answers, *rest))) for rest in product("abc-", repeat=left)}
                assert cannot_change(counted(answers), left) == (outcomes == {now}), (answers, left)
                checked += 1
    assert checked == 5 * sum(3**n for n in range(6))


def test_the_beta_posterior_is_the_mass_above_a_half() -> None:
    grid = (np.arange(200_000) + 0.5) / 200_000
    for first, second in ((0, 0), (1, 0), (4, 0), (3, 2), (2, 3), (9, 7)):
        density = grid**first * (1 - grid) ** second
        assert beta_posterior(first, second) == pytest.approx(density[grid > 0.5].sum() / density.sum(), abs=1e-6)


def test_the_dirichlet_posterior_of_two_answers_is_the_beta_posterior_and_of_more_that_of_draws() -> None:
    for first, second in ((0, 0), (1, 0), (4, 0), (3, 2), (2, 3), (40, 25), (300, 280)):
        assert dirichlet_posterior(first, [second]) == pytest.approx(beta_posterior(first, second), abs=1e-6)
    rng = np.random.default_rng(0)
    for votes in ([3, 2, 0], [5, 1, 1, 0], [1, 1, 1, 1, 0]):
        draws = rng.dirichlet(np.array(votes) + 1.0, 400_000)
        assert dirichlet_posterior(votes[0], votes[1:]) == pytest.approx((draws.argmax(1) == 0).mean(), abs=4e-3)


@pytest.mark.parametrize("rule", ["beta", "dirichlet", "certain"])
def test_no_rule_holds_within_a_wave(rule: str) -> None:
    """So a wave takes no sample that one-by-one sampling would not take, whatever the answers are."""
    for seen in range(5):
        for answers in product("ab", repeat=seen):
            votes, left = counted(answers), 8 - seen
            wave = least_more(votes, left, rule, 0.9)
            assert 1 <= wave <= left
            for more in range(1, wave):
                for rest in product("abc-", repeat=more):
                    assert stops(counted((*answers, *rest)), left - more, rule, 0.9) is None, (answers, rest)
