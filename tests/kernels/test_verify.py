"""Acceptance, residual and draws, against values worked out by hand."""

from __future__ import annotations

import torch

from blockroll.kernels.verify import (
    count_accepted,
    count_matching,
    draw,
    gumbel_argmax,
    mix_logits,
    residual_weights,
)

INF = torch.inf


def test_draw_maps_u_to_the_cumulative_intervals_and_skips_weight_zero() -> None:
    weight = torch.tensor([0.0, 1.0, 0.0, 3.0, 0.0])
    u = torch.tensor([2.0**-33, 0.2499, 0.25, 0.5, 1 - 2.0**-33], dtype=torch.float64)
    assert draw(weight.expand(5, 5).contiguous(), u).tolist() == [1, 1, 3, 3, 3]


def test_draw_reaches_rare_tokens_of_a_large_vocabulary() -> None:
    weight = torch.full((1, 300_000), 1e-9)
    weight[0, 0] = 1.0
    u = torch.tensor([1 - 2.0**-33], dtype=torch.float64)
    assert draw(weight, u).item() == 299_999  # a float32 running sum stays at 1 and never gets there


def test_draw_of_a_poisoned_row_stays_a_token_and_leaves_the_others() -> None:
    weight = torch.tensor([[torch.nan, 1.0], [0.0, 1.0]])
    got = draw(weight, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert 0 <= got[0] < 2 and got[1] == 1


def test_gumbel_argmax_ties_go_to_the_lower_token() -> None:
    score = torch.tensor([[0.0, 2.0, 2.0], [-INF, -INF, 1.0]])
    assert gumbel_argmax(score, torch.zeros(2, 3)).tolist() == [1, 2]


def test_count_matching_stops_at_the_first_mismatch_and_at_the_count() -> None:
    target = torch.tensor([[1, 2, 3], [1, 2, 3], [9, 2, 3], [1, 9, 3]])
    drafts = torch.tensor([[1, 2, 3], [1, 2, -1], [1, 2, 3], [1, 2, 3]])
    assert count_matching(target, drafts, torch.tensor([3, 2, 3, 3])).tolist() == [3, 2, 0, 1]
    assert count_matching(target[:1], drafts[:1], torch.tensor([1])).tolist() == [1]


def test_count_accepted_compares_u_with_the_ratio() -> None:
    logp = torch.tensor([0.2, 0.8]).log().expand(5, 2, 2)
    logq = torch.tensor([0.4, 0.6]).log().expand(5, 2, 2)
    drafts = torch.tensor([[0, 1], [0, 0], [0, 1], [1, 1], [0, -1]])
    u = torch.tensor([[0.499, 0.999], [0.499, 0.501], [0.501, 0.1], [0.999, 0.999], [0.1, 0.0]], dtype=torch.float64)
    assert count_accepted(logp, logq, drafts, torch.tensor([2, 2, 2, 2, 1]), u).tolist() == [2, 1, 0, 2, 1]


def test_count_accepted_with_zero_probabilities_and_poisoned_padding() -> None:
    logp = torch.tensor([[[-INF, 0.0], [torch.nan, torch.nan]]])
    logq = torch.tensor([[[0.0, -INF], [torch.nan, torch.nan]]])
    u = torch.full((1, 2), 0.5, dtype=torch.float64)
    assert count_accepted(logp, logq, torch.tensor([[0, -1]]), torch.tensor([1]), u).tolist() == [0]
    assert count_accepted(logp, logp, torch.tensor([[1, -1]]), torch.tensor([1]), u).tolist() == [1]


def test_residual_weights() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [1.0, 0.0, 0.0]])
    q = torch.tensor([[0.1, 0.6, 0.3], [torch.nan] * 3, [0.5, 0.3, 0.2], [0.0, 0.0, 1.0]])
    got = residual_weights(p.log(), q.log(), torch.tensor([True, False, True, True]))
    expected = torch.tensor([[0.4, 0.0, 0.0], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(got, expected)


def test_mix_logits_at_its_ends_is_exact_and_free_of_nan() -> None:
    p = torch.tensor([[1.25, -INF, 3.1]]).expand(3, 3)
    q = torch.tensor([[0.3, 2.0, -INF]]).expand(3, 3)
    got = mix_logits(p, q, torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64))
    assert torch.equal(got[0], p[0]) and torch.equal(got[1], q[1])
    torch.testing.assert_close(got[2], torch.tensor([0.775, -INF, -INF]))
