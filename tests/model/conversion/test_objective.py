"""The conversion's losses: what each term is, and what each lets through."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from blockroll.model.checkpoint import load_policy, read_config, save_policy
from blockroll.model.conversion.compare import LossRows
from blockroll.model.conversion.config import DraftLoss, Stage
from blockroll.model.conversion.objective import objective
from blockroll.model.conversion.sampled import sampled_drafts
from blockroll.model.layout import CLEAN, causal, diffusion
from blockroll.model.scoring import score

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
    clean_rows = len(LossRows.of(layout, target_T, PROMPTS).clean_R)
    gradient = clean["logits"].grad
    assert not gradient[:clean_rows].any() and gradient[clean_rows:].any()


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


def losses_and_gradient(policy, draft, **options):
    policy = copy.deepcopy(policy).requires_grad_(True)
    layout, target_T = pack()
    losses = objective(policy, layout, target_T, PROMPTS, alpha=1.0, draft=draft, **options)
    losses.total.backward()
    gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in policy.parameters()])
    return losses, gradient


EVERYTHING = DraftLoss(ce=0.3, tv=0.7, kl=0.2, slot_decay=0.8, slots="reached", sampled=0.5)


def test_chunks_of_the_vocabulary_change_nothing(make_policy, monkeypatch):
    policy = make_policy()
    policy.add_markov(3, torch.Generator().manual_seed(0))
    policy.markov.next.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    parent = make_policy(seed=1)
    whole, gradient = losses_and_gradient(policy, EVERYTHING, parent=parent)
    for width in (1, 3):
        monkeypatch.setattr("blockroll.model.conversion.compare.rows_at_once", lambda *_, width=width: width)
        losses, other = losses_and_gradient(policy, EVERYTHING, parent=parent)
        assert losses.total.item() == pytest.approx(whole.total.item(), abs=1e-6)
        assert (losses.ar, losses.draft, losses.overlap) == pytest.approx((whole.ar, whole.draft, whole.overlap), abs=1e-6)
        assert (other - gradient).abs().max() < 1e-6
    assert gradient.abs().max() > 1e-3


def test_memory_of_a_large_vocabulary_is_bounded():
    """Peak memory over a head of 60,000 tokens and 400 rows, forward and backward, in a process of its own; their logits
    take 96 MB, and several tensors have their size."""
    code = """
import resource, torch
from types import SimpleNamespace
from blockroll.model import vocabulary
from blockroll.model.conversion.compare import Heads, compare
torch.set_num_threads(1)
vocabulary.HEAD_BYTES["cpu"] = 24 * 2**20
V, R, D = 60_000, 200, 8
head = torch.nn.Linear(D, V, bias=False)
policy = SimpleNamespace(config=SimpleNamespace(vocab_size=V), head=head, conditioned=lambda x, previous: x)
clean, mask = torch.randn(R, D, requires_grad=True), torch.randn(R, D, requires_grad=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
token = torch.randint(V, (R,))
terms = compare(Heads(policy), clean, token, mask, torch.arange(R), token, token)
(terms.nll_R.mean() + terms.nll_M.mean() + terms.tv_M.mean() + terms.kl_M.mean()).backward()
assert mask.grad.abs().sum() > 0
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    # Freed blocks go back to the system, so that the peak counts what was held and not how the heap was cut up.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert float(done.stdout) < 80  # MiB; all at once takes 380


def test_slots_count_by_the_chance_that_they_are_reached(make_policy):
    policy = make_policy(dtype=torch.float32)
    layout, target_T = pack()
    rows = rows_by_hand(policy)
    for slots in ("reached", "accepted"):
        draft = DraftLoss(ce=0.4, tv=0.6, slots=slots)
        total = weights = 0.0
        for logp, logq, target, slot in rows:
            chance = 1.0 if slot == 0 else chance  # noqa: F821 - the rows of a block come in order
            p, q = logp.exp(), logq.exp()
            total += chance * (-0.4 * logq[target] + 0.3 * (p - q).abs().sum()).item()
            weights += chance
            chance *= (torch.minimum(p, q).sum() if slots == "reached" else (q[target] / p[target]).clamp_max(1)).item()
        losses = objective(policy, layout, target_T, PROMPTS, alpha=0.0, draft=draft)
        assert losses.total.item() == pytest.approx(total / weights, abs=1e-5)


def test_sampled_drafts_are_held_against_p_after_them(make_policy):
    """The term written out from whole texts: q of the drafted block, p of a causal pass over prefix and drafts."""
    policy = make_policy(dtype=torch.float32, sharpness=0.5)
    policy.add_markov(3, torch.Generator().manual_seed(0))
    policy.markov.next.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    layout, target_T = pack()
    hidden_TD = policy(layout)
    rows = LossRows.of(layout, target_T, PROMPTS)
    sampled = sampled_drafts(policy, hidden_TD, layout, rows)
    again = sampled_drafts(policy, hidden_TD, layout, rows)
    assert torch.equal(sampled.terms.nll_M, again.terms.nll_M)
    drafts = sampled.drafts_CB.tolist()
    place = 0
    for number, (document, spans) in enumerate(zip(DOCUMENTS, BLOCKS, strict=True)):
        start, length = next(s for s in spans if s[0] == sampled.start_C[number])
        tokens = drafts[number][:length]
        logp = policy.head(policy(causal([[*document[:start], *tokens]])))[start - 1 : -1].log_softmax(-1)
        first = torch.nonzero((layout.sequence_T == number) & (layout.block_T != CLEAN) & (layout.limit_T == start - 1))[0]
        previous = torch.tensor([document[start - 1], *tokens[:-1]])
        logq = policy.draft_head(hidden_TD[first : first + length], previous).log_softmax(-1)
        tv = 0.5 * (logp.exp() - logq.exp()).abs().sum(-1)
        torch.testing.assert_close(sampled.terms.tv_M[place : place + length], tv, atol=1e-5, rtol=0)
        ratio = (logp - logq).gather(1, torch.tensor(tokens)[:, None])[:, 0].clamp_max(0).exp()
        ratio[torch.tensor([token == policy.config.eos_token_id for token in tokens])] = 0.0
        torch.testing.assert_close(sampled.accepted_M[place : place + length], ratio, atol=1e-5, rtol=0)
        place += length
    assert place == len(sampled.accepted_M)
    assert policy.mask_token_id not in itertools.chain(*drafts)


def test_mask_rows_inside_a_prompt_carry_no_loss(make_policy):
    """Blocks aligned to the document may begin before its answer does."""
    policy = make_policy(dtype=torch.float32)
    layout, target_T = diffusion(DOCUMENTS, [[(1, 4), (5, 4)], [(1, 4), (5, 3)]], MASK)
    rows = LossRows.of(layout, target_T, PROMPTS)
    prompt_M = torch.tensor(PROMPTS)[layout.sequence_T[rows.mask_M]]
    assert (layout.position_T[rows.mask_M] >= prompt_M).all()
    assert (rows.teacher_M >= 0).all()
    assert torch.isfinite(objective(policy, layout, target_T, PROMPTS, 1.0, DraftLoss(slots="reached")).total)


def test_a_markov_head_learns_the_token_before(make_policy):
    """Targets that only the token before tells: without the head the draft cannot know them, with it it can."""
    draws = torch.Generator().manual_seed(0)
    after = torch.randperm(30, generator=draws) + 4

    def document():
        tokens = [1, int(torch.randint(4, 34, (), generator=draws))]
        while len(tokens) < 13:
            tokens.append(int(after[tokens[-1] - 4]) if len(tokens) % 2 else int(torch.randint(4, 34, (), generator=draws)))
        return tokens

    ends = {}
    for rank in (0, 16):
        policy = make_policy(dtype=torch.float32, num_hidden_layers=1, layer_types=None, sliding_window=None)
        if rank:
            policy.add_markov(rank, torch.Generator().manual_seed(0))
        optimizer = torch.optim.Adam(policy.requires_grad_(True).parameters(), lr=2e-2)
        for _ in range(60):
            layout, target_T = diffusion([document() for _ in range(16)], [[(2, 11)]] * 16, MASK)
            losses = objective(policy, layout, target_T, [2] * 16, alpha=0.0, draft=DraftLoss())
            optimizer.zero_grad()
            losses.total.backward()
            optimizer.step()
        ends[rank] = losses.draft
    assert ends[16] < 0.8 * ends[0]


def test_a_policy_with_a_markov_head_is_whole_on_disk(make_policy, tmp_path):
    """Both libraries load the directory; transformers passes over the head, this one finds it."""
    policy = make_policy(dtype=torch.float32)
    policy.add_markov(5, torch.Generator().manual_seed(0))
    policy.markov.next.weight.data.normal_()
    policy.converted = True
    back = load_policy(save_policy(policy, tmp_path / "policy"))
    assert back.markov is not None
    assert all(torch.equal(a, back.state_dict()[name]) for name, a in policy.markov.state_dict(prefix="markov.").items())
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    with torch.no_grad():
        logits = peer(torch.tensor([DOCUMENTS[0]])).logits[0]
    torch.testing.assert_close(logits, policy.head(policy(causal(DOCUMENTS[:1]))), atol=1e-4, rtol=0)
    assert read_config(tmp_path / "policy").diffusion["markov_rank"] == 5


def test_scores_do_not_depend_on_how_many_rows_the_head_sees(make_policy, monkeypatch):
    policy = make_policy(dtype=torch.float32)
    pairs = [(document[:2], document[2:]) for document in DOCUMENTS]
    whole = score(policy, pairs)
    monkeypatch.setattr("blockroll.model.scoring.rows_at_once", lambda *_: 2)
    for a, b in zip(whole, score(policy, pairs), strict=True):
        assert abs(a - b).max() < 1e-6
