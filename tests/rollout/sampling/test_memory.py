"""What steps of a CPU write into memory that stays is what they would write into new tensors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from blockroll.kernels.dispatch import using
from blockroll.kernels.verify import PairTable
from blockroll.rollout.params import SamplingParams
from blockroll.rollout.sampling import memory as memory_module
from blockroll.rollout.sampling.kernels import takes_apart
from blockroll.rollout.sampling.memory import StepMemory
from blockroll.rollout.sampling.sampler import SamplerRows, Verdict, draft, verify

S, M, HIDDEN, VOCAB, MASK = 6, 4, 5, 37, 3
NAN = float("nan")


@pytest.fixture(params=["numba", "reference"], autouse=True)
def implementation(request):
    """Of the kernels."""
    with using(request.param):
        yield request.param


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("compiled", [True, False])
def test_rows_that_drafts_are_drawn_from(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(memory_module, "compiled_where_installed", lambda function: function)
    memory, hidden, first = StepMemory(), normal(20, HIDDEN), np.array([0, 7, 18])
    for counts in ([3, 0, 1], [2, 2, 4], [1, 3, 0]):
        got, drafts = memory.drafting(hidden, first, np.array(counts), VOCAB)
        index = torch.from_numpy(first)[:, None] + torch.arange(max(counts))
        assert torch.equal(got, hidden[index.clamp(max=19)])
        assert drafts.count_S.tolist() == counts
        assert drafts.q_logits_SMV is not None and drafts.q_logits_SMV.shape == (3, max(counts), VOCAB)


@pytest.mark.parametrize("sampler", ["lossless", "coupled", "mixed"])
@pytest.mark.parametrize("temperature", [0.8, 0.0])
@pytest.mark.parametrize("counts", [[4, 0, 1, 3, 4, 2], [0, 0, 2, 1, 0, 4], [4] * 6])
def test_a_step_in_memory_that_stays(sampler: str, temperature: float, counts: list[int], implementation: str) -> None:
    """The verify rows come in one tensor, or apart: the first one, and the others of those sequences that have drafts."""
    params = SamplingParams(sampler=sampler, temperature=temperature, mix_weight=0.3)
    rows = SamplerRows.make([params] * S, list(range(S)), draft_temperature=0.6)
    before, anchor, count = torch.arange(S), torch.arange(S) + 9, torch.tensor(counts)
    p, q, pairs = normal(S, M + 1, VOCAB), normal(S, M, VOCAB, seed=1), PairTable(normal(VOCAB, VOCAB, seed=2))
    drawn = draft(rows, q.clone(), anchor, MASK, count, pairs, before, p)
    p[torch.arange(M + 1) > count[:, None]] = NAN
    expected = verify(rows, p.clone(), drawn, anchor)
    assert temperature or sampler == "mixed" or (expected.accepted_S[count > 0] > 0).any()
    memory = StepMemory()
    for again in range(2):
        _, into = memory.drafting(normal(50, HIDDEN), np.arange(S), np.array(counts), VOCAB)
        assert into.q_logits_SMV is not None
        into.q_logits_SMV.copy_(q)
        drafts = draft(rows, into.q_logits_SMV, anchor, MASK, into.count_S, pairs, before, p, into)
        assert torch.equal(drafts.token_SM, drawn.token_SM) and torch.equal(drafts.count_S, count)
        verdicts = [verify(rows, p.clone(), drafts, anchor, memory)]
        apart = takes_apart(rows, p)
        assert apart == (implementation == "numba" and sampler != "coupled" and temperature > 0)
        if apart:
            assert drafts is into
            verdicts = [replace(verdicts[0], **numbers(verdicts[0]))]
            verdicts.append(verify(rows, p[:, :1].clone(), drafts, anchor, memory, p[count > 0, 1:].clone()))
        for verdict in verdicts:
            for name, got in numbers(verdict).items():
                assert torch.equal(got, getattr(expected, name)), (name, again)
        if apart:  # what is left in memory is not read
            verdicts[-1].token_SR.fill_(-7), verdicts[-1].logprob_SR.fill_(NAN), verdicts[-1].accepted_S.fill_(99)
            into.token_SM.fill_(5)


def numbers(verdict: Verdict) -> dict[str, torch.Tensor]:
    """Copies."""
    return {name: getattr(verdict, name).clone() for name in Verdict.__slots__ if getattr(verdict, name) is not None}
