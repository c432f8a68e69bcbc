"""Figures of finished samples, against samples made by hand and against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from blockroll.model.policy import Policy
from blockroll.rollout.evaluation.counts import acceptance_by_kind, acceptance_by_slot, kinds_of, mean, ratio
from blockroll.rollout.types import StepTrace

# Prompt of 3, so the first anchor is at 2. Steps commit 3, 1, then 2 of the 4 that were accepted: the second ends it.
STEPS = (StepTrace(2, 3, 2, 3, 4, 1), StepTrace(5, 2, 0, 5, 4, 1), StepTrace(6, 4, 4, 7, 4, 1))


def test_acceptance_by_slot(by_hand) -> None:
    acceptance, survival = acceptance_by_slot([by_hand(STEPS, prompt=3, tokens=6)])
    assert survival == pytest.approx((2 / 3, 2 / 3, 0.0))
    assert acceptance == pytest.approx((2 / 3, 1.0, 0.0))


def test_acceptance_counts_a_rejection_before_the_end(by_hand) -> None:
    # One draft accepted of four, and the token that replaced the second one ended the sample.
    acceptance, survival = acceptance_by_slot([by_hand((StepTrace(0, 4, 1, 1, 4, 1),), prompt=1, tokens=2)])
    assert (acceptance, survival) == ((1.0, 0.0), (1.0, 0.0, 0.0, 0.0))


def test_acceptance_by_kind(by_hand) -> None:
    # Accepted: tokens 0, 1, then 4, 5. Replaced: 2, 3. A step whose drafts were all accepted adds a token no draft stood at.
    kinds = ["digits", "letters", "digits", "newline", "digits", "eos"]
    sample = by_hand(STEPS, prompt=3, tokens=[*range(6)])
    bonus = by_hand((StepTrace(0, 1, 1, 1, 4, 1),), prompt=1, tokens=[1, 3])
    table = acceptance_by_kind([sample, bonus], lambda token: kinds[token])
    assert table["digits"] == {"share": 3 / 8, "verified": 3, "acceptance": 2 / 3}
    assert table["letters"] == {"share": 2 / 8, "verified": 2, "acceptance": 1.0}
    assert table["newline"] == {"share": 2 / 8, "verified": 1, "acceptance": 0.0}
    assert table["eos"] == {"share": 1 / 8, "verified": 1, "acceptance": 1.0}
    assert table["punctuation_space"] == {"share": 0.0, "verified": 0, "acceptance": None}


def test_kinds(policy: Policy) -> None:
    kind_of = kinds_of(policy.tokenizer, policy.eos_token_ids)
    for text, kind in (("7", "digits"), ("a", "letters"), ("=", "punctuation_space"), (" ", "punctuation_space"),
                       ("\n", "newline")):  # fmt: skip
        (token,) = policy.tokenizer.encode(text, add_special_tokens=False)
        assert kind_of(token) == kind
    assert kind_of(policy.tokenizer.eos_token_id) == "eos"


def test_errors_are_those_of_repeated_draws() -> None:
    draw = np.random.default_rng(0)
    values, tasks = draw.random((4000, 40)), 40
    whole = [mean(row) for row in values]
    assert np.mean([error for _, error in whole]) == pytest.approx(np.std([value for value, _ in whole]), rel=0.05)
    below = draw.integers(1, 10, (4000, tasks))
    ratios = [ratio(row * under, under) for row, under in zip(values, below, strict=True)]
    assert ratios[0][0] == pytest.approx((values[0] * below[0]).sum() / below[0].sum())
    assert np.mean([error for _, error in ratios]) == pytest.approx(np.std([value for value, _ in ratios]), rel=0.05)
    assert ratio([0.0], [0.0]) == (0.0, 0.0)
