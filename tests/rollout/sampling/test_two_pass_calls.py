"""Drafts that are drawn, and verified, by calls made in advance are those of `draft` and `verify`."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("numba")

from blockroll.kernels.dispatch import using
from blockroll.kernels.verify import PairTable
from blockroll.kernels.verify.numba import draw_chain, reject
from blockroll.rollout.params import SamplingParams
from blockroll.rollout.sampling import two_passes
from blockroll.rollout.sampling.sampler import SamplerRows, Verdict, draft, verify
from blockroll.rollout.sampling.two_passes import TwoPassMemory, serves

D, M, HIDDEN, VOCAB, MASK = 6, 4, 5, 37, 3
NAN = float("nan")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sampler", ["lossless", "coupled", "mixed"])
@pytest.mark.parametrize("temperature", [0.8, 0.0])
@pytest.mark.parametrize("counts", [[4, 0, 1, 3, 4, 2], [0, 0, 2, 1, 0, 4], [4] * 6])
def test_calls_are_draft_and_verify(sampler: str, temperature: float, counts: list[int]) -> None:
    """Made for one step, they serve the next ones too, whose seeds, anchors and logits are others."""
    if sampler == "mixed" and not temperature:
        pytest.skip("torch serves it")
    params = [SamplingParams(sampler=sampler, temperature=temperature, mix_weight=0.3)] * D
    memory, pairs, made = TwoPassMemory(HIDDEN, VOCAB), PairTable(normal(VOCAB, VOCAB, seed=2)), set()
    first = SamplerRows.make(params, list(range(D)), draft_temperature=0.6)
    for step in range(3):
        rows = first.with_seeds(torch.arange(D) + 100 * step)
        before, anchor, count = torch.arange(D) + step, torch.arange(D) + 9 * step, torch.tensor(counts)
        p, q = normal(D, M + 1, VOCAB, seed=step), normal(D, M, VOCAB, seed=10 + step)
        expected_drafts = draft(rows, q.clone(), anchor, MASK, count, pairs, before, p)
        p[torch.arange(M + 1) > count[:, None]] = NAN
        expected = verify(rows, p.clone(), expected_drafts, anchor)
        assert serves(rows, p)
        own = memory.of(D, M)
        for line, numbers in zip(own.keys_4D, (count, anchor, before, rows.seed_S), strict=True):
            line[:] = numbers
        draws, verifies = own.calls(rows, pairs.pair_VV, MASK)
        made.add((draws, verifies))
        own.drawn_NV[:D], own.drawn_NV[D:], own.logits_DRV[:] = p[:, 0], q.view(-1, VOCAB), p
        draw_chain(draws)
        assert torch.equal(own.drafts.token_SM, expected_drafts.token_SM) and torch.equal(own.drafts.count_S, count)
        if verifies is None:
            assert sampler == "coupled" or not temperature
            found = verify(rows, own.logits_DRV, own.drafts, anchor)
        else:
            reject(verifies)
            found = own.verdict
        for name, got in numbers_of(found).items():
            assert torch.equal(got, getattr(expected, name)), (name, step)
        for left in (own.drafts.token_SM, own.verdict.token_SR, own.verdict.accepted_S):  # what is left in memory is not read
            left.fill_(99)
    assert len(made) == 1


def test_calls_are_made_anew_for_other_parameters_and_weights() -> None:
    """Also where all memory is the same."""
    memory, pairs = TwoPassMemory(HIDDEN, VOCAB), [PairTable(normal(VOCAB, VOCAB, seed=n)).pair_VV for n in (1, 2)]
    rows = [SamplerRows.make([SamplingParams("lossless", t)] * D, list(range(D))) for t in (0.5, 0.5, 1.0)]
    calls = [memory.of(D, M).calls(each, pairs[0], MASK) for each in rows] + [memory.of(D, M).calls(rows[2], pairs[1], MASK)]
    assert len(set(calls)) == 4
    assert memory.of(D, M).calls(rows[2].with_seeds(rows[0].seed_S), pairs[1], MASK) is not calls[3]
    assert memory.of(D, M).calls(rows[2].with_seeds(rows[0].seed_S), pairs[1], MASK) == calls[3]


def test_calls_hold_what_they_were_made_of() -> None:
    """Also copies: of a table that lies in another order, the calls have the address of one that nobody else holds."""
    memory, table = TwoPassMemory(HIDDEN, VOCAB), normal(VOCAB, VOCAB).t()
    rows = SamplerRows.make([SamplingParams("lossless")] * D, list(range(D)))
    own = memory.of(D, M)
    draws, verifies = own.calls(rows, table, MASK)
    assert own._calls is not None and verifies is not None
    held = {tensor.data_ptr() for tensor in own._calls.held}
    assert draws.pair_at != table.data_ptr()
    assert {getattr(call, name) for call in (draws, verifies) for name in call._fields if name.endswith("_at")} <= held


def test_memory_that_grows_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = TwoPassMemory(HIDDEN, VOCAB)
    small = memory.of(2, 3)
    assert memory.of(2, 3) is small
    assert memory.of(4, 3) is not small and memory.of(2, 3) is not small  # both lie in the larger memory now
    assert memory.of(2, 3).logits_DRV.data_ptr() == memory.of(4, 3).logits_DRV.data_ptr() == memory.of(1, 1).logits_DRV.data_ptr()
    monkeypatch.setattr(two_passes, "_MOST_SIZES", 2)
    for most in (1, 2, 3):
        memory.of(2, most)
    assert len(memory._made) <= 2


@pytest.mark.parametrize(("params", "serve"), [
    ([SamplingParams("lossless")] * 2, True), ([SamplingParams("coupled", 0.0)] * 2, True), ([SamplingParams("ar")] * 2, False),
    ([SamplingParams("lossless", top_p=0.5)] * 2, False), ([SamplingParams("lossless"), SamplingParams("mixed")], False),
    ([SamplingParams("mixed", 0.0)] * 2, False), ([SamplingParams("lossless", logprobs=2)] * 2, False),
])  # fmt: skip
def test_what_is_served(params: list[SamplingParams], serve: bool) -> None:
    rows = SamplerRows.make(params, [1, 2])
    assert serves(rows, torch.empty(0)) == serve
    assert not serves(rows, torch.empty(0, dtype=torch.float64))
    with using("reference"):
        assert not serves(rows, torch.empty(0))


def numbers_of(verdict: Verdict) -> dict[str, torch.Tensor]:
    return {name: getattr(verdict, name) for name in Verdict.__slots__ if getattr(verdict, name) is not None}
