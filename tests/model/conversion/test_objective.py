"""The conversion's losses: what each term is, and what each lets through."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from blockroll.model.conversion.config import DraftLoss, Stage
from blockroll.model.conversion.objective import objective
from blockroll.model.layout import CLEAN, causal, diffusion

DOCUMENTS = [[1, 5, 9, 12, 7, 33, 8, 2], [1, 21, 14, 6, 30, 2]]
PROMPTS = [3, 2]
BLOCKS = [[(3, 4), (5, 4)], [(2, 3), (5, 3)]]
MASK = 39


def pack():
    return diffusion(DOCUMENTS, BLOCKS, MASK)


def rows_by_hand(policy):
    """(logp of the clean row before, logq of the mask row, target, slot) of every mask row with a target."""
    layout, target_T = pack()
    logits = policy.head(policy(layout)).log_softmax(-1)
    found = []
    for row in range(layout.rows):
        if layout.block_T[row] == CLEAN or target_T[row] < 0:
            continue
        same = (layout.sequence_T == layout.sequence_T[row]) & (layout.block_T == CLEAN)
        before = torch.nonzero(same & (layout.position_T == layout.position_T[row] - 1)).item()
        slot = int(layout.position_T[row] - layout.limit_T[row]) - 1
        found.append((logits[before], logits[row], int(target_T[row]), slot))
    return found


@pytest.mark.parametrize("draft", [
    DraftLoss(), DraftLoss(ce=0.0, tv=1.0), DraftLoss(ce=0.0, kl=1.0, slot_decay=0.5), DraftLoss(ce=0.3, tv=0.7, kl=0.2),
])  # fmt: skip
def test_losses_equal_the_sums_written_out(make_policy, draft):
    policy = make_policy(dtype=torch.float32)
    layout, target_T = pack()
    losses = objective(policy, layout, target_T, PROMPTS, alpha=0.0, draft=draft)
    total = weights = overlap = 0.0
    rows = rows_by_hand(policy)
    for logp, logq, target, slot in rows:
        p, q = logp.exp(), logq.exp()
        loss = draft.ce * -logq[target] + draft.tv * 0.5 * (p - q).abs().sum() + draft.kl * (p * (logp - logq)).sum()
        total, weights = total + draft.slot_decay**slot * loss, weights + draft.slot_decay**slot
        overlap += torch.minimum(p, q).sum() / len(rows)
    torch.testing.assert_close(losses.total, total / weights, atol=1e-5, rtol=0)
    assert losses.overlap == pytest.approx(float(overlap), abs=1e-5)


def test_ar_loss_leaves_prompts_out(make_policy):
    policy = make_policy(dtype=torch.float32)
    layout, target_T = pack()
    losses = objective(policy, layout, target_T, PROMPTS, alpha=1.0, draft=DraftLoss(ce=0.0, tv=0.0))
    terms = []
    for document, prompt in zip(DOCUMENTS, PROMPTS, strict=True):
        logits = policy.head(policy(causal([document])))
        terms.append(F.cross_entropy(logits[prompt - 1 : -1], torch.tensor(document[prompt:]), reduction="none"))
    expected = torch.cat(terms).mean()
    assert losses.ar == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(losses.total, expected / 2, atol=1e-5, rtol=0)


def test_draft_loss_does_not_pull_p(make_policy):
    """Self-distillation moves q alone: a clean row's logits get no gradient through TV or KL."""
    policy = make_policy(dtype=torch.float32)
    layout, target_T = pack()
    clean = {}

    def head(hidden_RD):
        logits = type(policy).head(policy, hidden_RD)
        if not clean:
            logits.retain_grad()
            clean["logits"] = logits
        return logits

    trained = copy.deepcopy(policy).requires_grad_(True)
    policy = trained
    policy.head = head
    losses = objective(policy, layout, target_T, PROMPTS, alpha=0.0, draft=DraftLoss(ce=0.0, tv=1.0, kl=1.0))
    losses.total.backward()
    assert clean["logits"].grad is None or not clean["logits"].grad.any()


def test_a_parents_p_is_kept(make_policy):
    """With the parent itself the AR term is zero and so is its gradient; with another policy it is their divergence."""
    parent = make_policy(dtype=torch.float32)
    layout, target_T = pack()
    policy = copy.deepcopy(parent).requires_grad_(True)
    none = DraftLoss(ce=0.0)
    losses = objective(policy, layout, target_T, PROMPTS, alpha=1.0, draft=none, parent=parent)
    losses.total.backward()
    assert abs(losses.total.item()) < 1e-6
    assert max(p.grad.abs().max().item() for p in policy.parameters() if p.grad is not None) < 1e-5

    other = make_policy(dtype=torch.float32, seed=1)
    total = objective(other, layout, target_T, PROMPTS, alpha=1.0, draft=none, parent=parent).total
    terms = []
    for document, prompt in zip(DOCUMENTS, PROMPTS, strict=True):
        logp, logo = (x.head(x(causal([document]))).log_softmax(-1)[prompt - 1 : -1] for x in (parent, other))
        terms.append((logp.exp() * (logp - logo)).sum(-1))
    torch.testing.assert_close(total, torch.cat(terms).mean() / 2, atol=1e-5, rtol=0)


def test_an_ar_stage_cannot_keep_its_parent():
    with pytest.raises(ValueError, match="ar_target"):
        Stage(name="ar", kind="ar", tokens=1, ar_target="parent")
