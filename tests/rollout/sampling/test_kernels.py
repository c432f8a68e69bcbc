"""Samplers on the kernels, Triton's (interpreted) and numba's, against the same samplers on torch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from blockroll.kernels.dispatch import using
from blockroll.kernels.verify import PairTable
from blockroll.rollout.sampling import kernels
from blockroll.rollout.sampling.drafts import Drafts
from blockroll.rollout.sampling.sampler import SamplerRows, draft, verify
from blockroll.rollout.types import SamplingParams
from blockroll.seeds import sample_seed

VOCAB, MASK, M = 30, 29, 3


def logits(s: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """p of the verify rows, and q near it."""
    generator = torch.Generator().manual_seed(5)
    p = 2 * torch.randn(s, M + 1, VOCAB, generator=generator)
    q = p[:, :M] + 0.4 * torch.randn(s, M, VOCAB, generator=generator)
    return p.to(dtype), q.to(dtype)


def same(got, expected) -> None:
    for name in expected.__slots__:
        a, b = getattr(got, name), getattr(expected, name)
        if b is None:
            assert a is None, name
            continue
        assert a.dtype == b.dtype, name
        if a.is_floating_point():
            torch.testing.assert_close(a, b, atol=3e-6, rtol=3e-6, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert torch.equal(a, b), name


@pytest.fixture(params=["triton", "numba"])
def kernel(request):
    """Which kernels."""
    return request.param


def step(implementation, params, dtype=torch.float32, markov=None, known=False):
    """Draft, select half and join them again in another order, then verify. `known`: p of the first draft is."""
    s = len(params)
    p, q = logits(s, dtype)
    rows = SamplerRows.make(params, [sample_seed(2**40 + i, 0) for i in range(s)], draft_temperature=0.7)
    anchor, count = torch.arange(s) * 3 + 4, torch.arange(s) % (M + 1)
    with using(implementation):
        drafts = draft(rows, q, anchor, MASK, count, markov, torch.arange(s) % VOCAB, p if known else None)
        half = s // 2
        drafts = Drafts.join([drafts.select(torch.arange(half)), drafts.select(torch.arange(half, s))])
        drafts = drafts.limit(torch.full((s,), M))
        return drafts, verify(rows, p[:, : drafts.token_SM.shape[1] + 1], drafts, anchor)


@pytest.mark.parametrize(
    ("sampler", "temperature", "dtype"),
    [
        ("ar", 0.7, torch.float16),
        ("coupled", 0.7, torch.float32),
        ("coupled", 0.0, torch.float16),
        ("lossless", 0.7, torch.float16),
        ("lossless", 0.0, torch.float32),
        ("mixed", 0.7, torch.float32),
        ("mixed", 0.0, torch.float32),
    ],
)
def test_the_tokens_of_torch(kernel, sampler, temperature, dtype) -> None:
    params = [SamplingParams(sampler=sampler, temperature=temperature, mix_weight=0.3)] * 8
    drafts, verdict = step(kernel, params, dtype)
    assert drafts.logq_SMV is None or sampler == "mixed"
    expected_drafts, expected = step("reference", params, dtype)
    assert torch.equal(drafts.token_SM, expected_drafts.token_SM)
    same(verdict, expected)


def test_a_batch_of_every_kind(kernel) -> None:
    """Cut-offs beside plain rows, whose logits are half as wide in memory."""
    params = [
        SamplingParams(sampler=sampler, temperature=temperature, top_p=top_p)
        for sampler in ("lossless", "mixed", "coupled", "ar") for temperature, top_p in ((1.0, 1.0), (0.8, 0.9), (0.0, 1.0))
    ]  # fmt: skip
    same(step(kernel, params, torch.float16)[1], step("reference", params, torch.float16)[1])


@pytest.mark.parametrize("sampler", ["lossless", *(pytest.param(x, marks=pytest.mark.slow) for x in ("ar", "coupled", "mixed"))])
def test_the_tokens_of_torch_within_cut_offs(sampler) -> None:
    """Drafts, verdict and the mass inside the support; the alternatives are those of the whole distribution."""
    params = [SamplingParams(sampler=sampler, temperature=0.8, top_k=9, top_p=0.8, min_p=0.02, logprobs=3)] * 2
    drafts, verdict = step("triton", params)
    expected_drafts, expected = step("reference", params)
    assert torch.equal(drafts.token_SM, expected_drafts.token_SM) and (expected.support_logmass_SR < -0.05).any()
    same(verdict, expected)


@pytest.mark.parametrize(
    ("sampler", "cuts"),
    [("coupled", {}), ("lossless", {}), ("mixed", {}), pytest.param("lossless", {"top_p": 0.7}, marks=pytest.mark.slow)],
)
def test_drafts_that_know_the_one_before(kernel, sampler, cuts) -> None:
    table = PairTable(torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1)))
    params = [SamplingParams(sampler=sampler, temperature=0.9, **cuts)] * 6
    drafts, verdict = step(kernel, params, markov=table)
    expected_drafts, expected = step("reference", params, markov=table)
    assert torch.equal(drafts.token_SM, expected_drafts.token_SM)
    same(verdict, expected)


@pytest.mark.parametrize("table", [PairTable(torch.zeros(VOCAB, VOCAB)), None], ids=["pairs", "plain"])
@pytest.mark.parametrize("sampler", ["lossless", *(pytest.param(x, marks=pytest.mark.slow) for x in ("coupled", "mixed"))])
def test_drafts_whose_first_one_is_drawn_from_p(kernel, sampler, table) -> None:
    """At several temperatures. The mixture takes no p."""
    params = [SamplingParams(sampler=sampler, temperature=0.6 + i / 10) for i in range(6)]
    drafts, verdict = step(kernel, params, markov=table, known=True)
    expected_drafts, expected = step("reference", params, markov=table, known=True)
    assert torch.equal(drafts.token_SM, expected_drafts.token_SM)
    same(verdict, expected)
    if sampler != "mixed":
        assert (verdict.accepted_S > 0).sum() >= 3  # all that have drafts, but for p's own mask token


def test_rows_that_the_kernels_serve() -> None:
    plain, cut, greedy = (
        SamplerRows.make([SamplingParams(sampler="mixed", **changes)], [1]).groups[0]
        for changes in (dict(), dict(top_k=3), dict(temperature=0.0))
    )
    (lossless,) = SamplerRows.make([SamplingParams(top_k=3)], [1]).groups
    p, _ = logits(1)
    for implementation in ("triton", "numba", "auto"):
        with using(implementation):
            assert kernels.serves(plain, p) and not kernels.serves(plain, p.double())
            assert not kernels.serves(cut, p) and not kernels.serves(greedy, p)
            assert kernels.serves(lossless, p) == (implementation == "triton")
    with using("reference"):
        assert not kernels.serves(plain, p)


@pytest.mark.parametrize("sampler", ["lossless", "mixed"])
def test_a_plain_row_without_drafts_beside_a_cut_one_with_some(kernel, sampler) -> None:
    """The only q of the batch is then of a kind that kernels do not read."""
    cut, plain = SamplingParams(sampler, top_k=5), SamplingParams(sampler)
    p, q = logits(2)
    anchor = torch.tensor([4, 9])
    with using(kernel):
        waiting = draft(SamplerRows.make([cut], [1]), q[:1], anchor[:1], MASK)
        assert (waiting.q_lse_SM is None) == (kernel == "numba" or sampler == "mixed")
        drafts = Drafts.join([waiting, Drafts.none(1)])
        verdict = verify(SamplerRows.make([cut, plain], [1, 2]), p[:, : drafts.token_SM.shape[1] + 1], drafts, anchor)
        alone = verify(SamplerRows.make([plain], [2]), p[1:, :1], Drafts.none(1), anchor[1:])
    assert verdict.accepted_S[1] == 0 and torch.equal(verdict.token_SR[1, :1], alone.token_SR[0])
    assert verdict.logprob_SR[1, 0] == alone.logprob_SR[0, 0]
