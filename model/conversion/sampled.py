"""Drafts drawn from q in training, and p after those drafts.

In decoding, slot i follows the drafts 1..i-1 of its own block, not the tokens of a document. One block of each document is
drafted as decoding would; one more pass without gradient, over the document up to the block and then the drafts, gives p there.

Invariants:
- Which block, and which drafts, are a function of the document's tokens and the weights: a resumed run draws the same, and so
  does one that packs its documents otherwise.
- A draft behind an end of sequence does not count.

Legend: M drafted rows, C blocks, B slots of the longest block, D hidden, V vocabulary.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch

from ..layout import CLEAN, TokenLayout, causal
from ..policy import Policy
from .compare import Heads, LossRows, Terms, compare


@dataclass(frozen=True)
class Sampled:
    """Drafted rows, block by block.

    Attributes:
        start_C: position each block begins at. drafts_CB: its drafts, those of shorter blocks filled up.
        terms: of q at the drafts' slots against p after the drafts before them.
        accepted_M: min(1, p / q) of each draft, 0 for an end of sequence: the chance to go on after it.
        block_M, slot_M: number of the block and place in it.
    """

    start_C: torch.Tensor
    drafts_CB: torch.Tensor
    terms: Terms
    accepted_M: torch.Tensor
    block_M: torch.Tensor
    slot_M: torch.Tensor


def sampled_drafts(
    policy: Policy, hidden_TD: torch.Tensor, layout: TokenLayout, rows: LossRows, temperature: float = 1.0
) -> Sampled:
    """Draft one block of each document at `temperature` and compare q with p after the drafts; p has no gradient.

    Args:
        hidden_TD: final hidden states of the pack; q's gradient flows into them.
        rows: of the pack; only blocks that hold a row with loss are drafted.
    """
    device = hidden_TD.device
    first_S = torch.searchsorted(layout.sequence_T, torch.arange(layout.sequences, device=device))
    sequence_M = layout.sequence_T[rows.mask_M]
    end_S = [*first_S[1:].tolist(), layout.rows]
    chosen, starts, texts, draws = [], [], [], []
    for s in sequence_M.unique().tolist():
        tokens_N, clean_N = (x[int(first_S[s]) : end_S[s]] for x in (layout.token_T, layout.block_T == CLEAN))
        draw = torch.Generator().manual_seed(zlib.crc32(tokens_N[clean_N].cpu().numpy().tobytes()))
        blocks = rows.block_M[sequence_M == s].unique()
        block = blocks[torch.randint(len(blocks), (), generator=draw)]
        row_B = torch.nonzero(layout.block_T == block)[:, 0]
        first, start = int(first_S[s]), int(layout.position_T[row_B[0]])
        chosen.append(row_B)
        starts.append(start)
        texts.append(layout.token_T[first : first + start].tolist())
        draws.append(torch.rand(len(row_B), generator=draw, dtype=torch.float64))
    count_C = torch.tensor([len(row_B) for row_B in chosen], device=device)
    row_CB = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
    draw_CB = torch.nn.utils.rnn.pad_sequence(draws, batch_first=True).to(device)
    real_CB = torch.arange(row_CB.shape[1], device=device) < count_C[:, None]
    previous_C = torch.tensor([text[-1] for text in texts], device=device)
    with torch.no_grad():
        token_CB, previous_CB = _draft(policy, hidden_TD[row_CB], previous_C, temperature, draw_CB)
        drafted = [[*text, *line[:n]] for text, line, n in zip(texts, token_CB.tolist(), count_C.tolist(), strict=True)]
        after_TD = policy(causal(drafted).to(device))
    lengths_C = torch.tensor([len(text) for text in drafted], device=device)
    start_C = torch.tensor(starts, device=device)
    slot_CB = torch.arange(row_CB.shape[1], device=device).expand_as(row_CB)
    teacher_CB = (lengths_C.cumsum(0) - lengths_C + start_C - 1)[:, None] + slot_CB
    token_M = token_CB[real_CB]
    terms = compare(
        Heads(policy, temperature=temperature), after_TD[teacher_CB[real_CB]], token_M, hidden_TD[row_CB[real_CB]],
        torch.arange(len(token_M), device=device), previous_CB[real_CB], token_M,
    )  # fmt: skip
    ends = torch.tensor(policy.eos_token_ids, dtype=torch.int64, device=device)
    accepted_M = (terms.logp_M + terms.nll_M.detach()).clamp_max(0).exp().masked_fill(torch.isin(token_M, ends), 0.0)
    block_CB = torch.arange(len(chosen), device=device)[:, None].expand_as(row_CB)
    return Sampled(start_C, token_CB, terms, accepted_M, block_CB[real_CB], slot_CB[real_CB])


def _draft(
    policy: Policy, hidden_CBD: torch.Tensor, previous_C: torch.Tensor, temperature: float, draw_CB: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """token_CB drawn from q slot by slot, by the uniform numbers draw_CB, and the token before each."""
    tokens, before = [], []
    for hidden_CD, draw_C in zip(hidden_CBD.unbind(1), draw_CB.unbind(1), strict=True):
        before.append(previous_C)
        logits_CV = policy.draft_head(hidden_CD, previous_C).float() / temperature
        logits_CV[:, policy.mask_token_id] = -torch.inf
        mass_CV = logits_CV.double().softmax(-1).cumsum(-1)
        # The first token whose cumulated mass exceeds the number: never one of mass 0.
        found_C1 = torch.searchsorted(mass_CV, draw_C[:, None] * mass_CV[:, -1:], right=True)
        previous_C = found_C1[:, 0].clamp_max(mass_CV.shape[1] - 1)
        tokens.append(previous_C)
    return torch.stack(tokens, 1), torch.stack(before, 1)
