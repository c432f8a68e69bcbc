"""Where p of the next token is known before the draft, the first draft is p's own token at any temperature of the drafts."""

from __future__ import annotations

import pytest
import torch

from blockroll.rollout.params import SamplingParams
from blockroll.rollout.sampling.adjustment import Prefix
from blockroll.rollout.sampling.drafts import SamplerRows
from blockroll.rollout.sampling.sampler import draft, verify

SEQUENCES, DRAFTS, VOCAB, MASK = 512, 3, 24, 3
PENALTIES = dict(presence_penalty=1.5, repetition_penalty=1.4, logit_bias={5: 2.0})


@pytest.mark.parametrize("sampler", ["coupled", "lossless"])
@pytest.mark.parametrize("others", [{}, {"top_p": 0.8}, PENALTIES], ids=["plain", "cut", "adjusted"])
@pytest.mark.parametrize("draft_temperature", [0.5, 0.7])
def test_the_first_draft_is_accepted(sampler: str, others: dict, draft_temperature: float) -> None:
    params = SamplingParams(sampler=sampler, temperature=0.8, **others)
    draw = torch.Generator().manual_seed(0)
    p = torch.randn(1, DRAFTS + 1, VOCAB, generator=draw).expand(SEQUENCES, -1, -1).contiguous()
    p[..., MASK] = -torch.inf
    q = torch.randn(1, DRAFTS, VOCAB, generator=draw).expand(SEQUENCES, -1, -1).contiguous()
    seeds, anchor_S = list(range(SEQUENCES)), torch.full((SEQUENCES,), 7)
    prefixes = [Prefix([*range(6, 14)], 4, ())] * SEQUENCES
    rows = SamplerRows.make([params] * SEQUENCES, seeds, "cpu", prefixes, draft_temperature)
    drafts = draft(rows, q, anchor_S, MASK, p_first_SRV=p[:, :1].clone())
    assert (verify(rows, p, drafts, anchor_S).accepted_S >= 1).all()
