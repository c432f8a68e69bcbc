"""Sampling and verification in Triton (interpreted) and in numba against the reference, and all against the samplers."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from blockroll.kernels.dispatch import using
from blockroll.kernels.philox import Purpose
from blockroll.kernels.philox.reference import gumbel
from blockroll.kernels.verify import (
    PairTable,
    count_matching,
    draft_chain,
    logprobs,
    reference,
    sample_cdf,
    sample_gumbel,
    verify_matching,
    verify_rejection,
)
from blockroll.rollout.sampling.sampler import Drafts, SamplerRows, draft, verify
from blockroll.rollout.types import SamplingParams

NAN = torch.nan


@pytest.fixture(autouse=True, params=["triton", "numba"])
def implementation(request, poisoned_outputs):
    with using(request.param):
        yield request.param


def keys(s: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Seeds of more than 32 bits, and positions."""
    return torch.arange(s) * 7919 + 2**45 + 3, torch.arange(s) * 5 + 11


def normal(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (2 * torch.randn(size, generator=torch.Generator().manual_seed(seed))).to(dtype)


def same(got, expected) -> None:
    for name, a, b in zip(expected._fields, got, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        if a.is_floating_point():
            torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("vocab_size", [1, 3, 41, 4096, 9001])
@pytest.mark.parametrize("sampler", ["gumbel", "cdf"])
def test_sampling_equals_the_reference(sampler: str, vocab_size: int, dtype: torch.dtype) -> None:
    fast, plain = {
        "gumbel": (sample_gumbel, reference.sample_gumbel), "cdf": (sample_cdf, reference.sample_cdf)
    }[sampler]  # fmt: skip
    logits = normal(3, 2, vocab_size, dtype=dtype)
    temperature = torch.tensor([0.0 if sampler == "gumbel" else 0.3, 0.7, 1.0], dtype=torch.float64)
    seed, position = keys(3)
    same(fast(logits, temperature, seed, position), plain(logits, temperature, seed, position))
    if vocab_size > 1:
        excluded = int(logits[0, 0].argmax())
        got = fast(logits, temperature, seed, position, excluded)
        same(got, plain(logits, temperature, seed, position, excluded))
        assert (got.token_SR != excluded).all()


def test_the_purpose_is_part_of_the_key() -> None:
    logits, temperature, (seed, position) = normal(4, 3, 300), torch.ones(4), keys(4)
    got = sample_cdf(logits, temperature, seed, position, -1, Purpose.RESAMPLE)
    same(got, reference.sample_cdf(logits, temperature, seed, position, -1, Purpose.RESAMPLE))
    assert not torch.equal(got.token_SR, sample_cdf(logits, temperature, seed, position).token_SR)


def test_ties_go_to_the_lower_token_also_across_chunks() -> None:
    logits = torch.zeros(1, 1, 9000)
    logits[..., [4100, 4200, 8500]] = 3.0
    seed, position = keys(1)
    assert sample_gumbel(logits, torch.zeros(1), seed, position).token_SR.item() == 4100


def test_tokens_too_close_for_rough_noise_are_told_apart() -> None:
    seed, position = keys(3)
    noise = gumbel(seed[:, None], position[:, None] + torch.arange(2), 5000, Purpose.NOISE)
    logits = -noise  # so that every token's noisy score is 0, to the last bit in all sequences but the first
    logits[0] *= 300
    temperature = torch.tensor([300.0, 1.0, 1.0])
    same(sample_gumbel(logits, temperature, seed, position), reference.sample_gumbel(logits, temperature, seed, position))


def test_minus_infinity_is_never_drawn_and_whole_chunks_of_it_do_no_harm() -> None:
    logits = torch.full((2, 4, 9000), -torch.inf)
    logits[..., [17, 8999]] = normal(2, 4, 2)
    temperature, (seed, position) = torch.ones(2), keys(2)
    for sampler, expected in ((sample_gumbel, reference.sample_gumbel), (sample_cdf, reference.sample_cdf)):
        got = sampler(logits, temperature, seed, position)
        same(got, expected(logits, temperature, seed, position))
        assert torch.isin(got.token_SR, torch.tensor([17, 8999])).all()


def test_slices_of_rows_need_no_copy_and_poisoned_rows_stay_in_theirs() -> None:
    logits, temperature, (seed, position) = normal(3, 5, 4500), torch.ones(3), keys(3)
    logits[1, 1] = NAN
    part = logits[:, 1:3]
    for sampler, expected in ((sample_gumbel, reference.sample_gumbel), (sample_cdf, reference.sample_cdf)):
        got, wanted = sampler(part, temperature, seed, position), expected(part, temperature, seed, position)
        assert 0 <= got.token_SR[1, 0] < 4500
        for s, r in ((0, 0), (0, 1), (1, 1), (2, 0), (2, 1)):
            assert got.token_SR[s, r] == wanted.token_SR[s, r]
            torch.testing.assert_close(got.logprob_SR[s, r], wanted.logprob_SR[s, r])


def step(
    s: int, m: int, vocab_size: int, sharpness: float = 0.3, seed: int = 0, excluded: int = -1, draft_temperature: float = 1.0
):  # fmt: skip
    """Arguments of `verify_rejection`: q near p, drafts drawn from q, ragged counts, everything past them poisoned."""
    draw = torch.Generator().manual_seed(seed)
    p = normal(s, m + 1, vocab_size, seed=seed)
    q = p[:, :m] + sharpness * torch.randn(s, m, vocab_size, generator=draw)
    temperature = 0.5 + torch.rand(s, generator=draw, dtype=torch.float64)
    key, anchor = keys(s)
    drafted = reference.sample_cdf(q, temperature * draft_temperature, key, anchor + 1, excluded)
    count = torch.randint(0, m + 1, (s,), generator=draw)
    token, lse = drafted.token_SR.clone(), drafted.lse_SR.clone()
    for i, c in enumerate(count.tolist()):
        token[i, c:], lse[i, c:], q[i, c:], p[i, c + 1 :] = -1, NAN, NAN, NAN
    return p, q, lse, token, count, temperature, key, anchor, excluded


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("s, m, vocab_size", [(24, 4, 23), (5, 3, 4500), (3, 1, 1), (4, 0, 50)])
@pytest.mark.parametrize("draft_temperature", [None, 0.6])
def test_rejection_equals_the_reference(s: int, m: int, vocab_size: int, mixed: bool, draft_temperature: float | None) -> None:
    excluded = vocab_size - 1 if vocab_size > 1 else -1
    arguments = step(s, m, vocab_size, excluded=excluded, draft_temperature=draft_temperature or 1.0)
    weight = torch.linspace(0, 1, s, dtype=torch.float64) if mixed else None
    more = weight, None if draft_temperature is None else arguments[5] * draft_temperature
    got, expected = verify_rejection(*arguments, *more), reference.verify_rejection(*arguments, *more)
    same(got, expected)
    if s == 24:  # every way to end a step is among them
        count = arguments[4]
        assert len(set(got.accepted_S.tolist())) == m + 1
        assert ((got.accepted_S == count) & (count > 0)).any() and (got.accepted_S < count).any()


def test_rejection_where_target_and_draft_are_equal_to_the_last_bit() -> None:
    p, _, _, _, _, temperature, key, anchor, excluded = step(6, 2, 40)
    p = normal(6, 3, 40)
    drafted = reference.sample_cdf(p[:, :2], temperature, key, anchor + 1, excluded)
    count = torch.full((6,), 2)
    arguments = p, p[:, :2], drafted.lse_SR, drafted.token_SR, count, temperature, key, anchor
    same(verify_rejection(*arguments), reference.verify_rejection(*arguments))
    # A draft that q cannot have made is refused, and without mass in the residual the token is drawn from p.
    impossible = drafted.lse_SR - 50
    got = verify_rejection(p, p[:, :2], impossible, *arguments[3:])
    assert got.accepted_S.eq(0).all()
    wanted = reference.sample_cdf(p[:, :1], temperature, key, anchor + 1, -1, Purpose.RESAMPLE)
    assert torch.equal(got.token_SR[:, 0], wanted.token_SR[:, 0])


def test_a_row_alone_equals_the_row_in_a_batch_of_64() -> None:
    arguments = step(64, 1, 20)
    with using(batch_invariant=True):
        together = verify_rejection(*arguments)
        drawn = sample_gumbel(arguments[0][:, :1], arguments[5], arguments[6], arguments[7])
        for i in (0, 63):
            one = [x[i : i + 1] if isinstance(x, torch.Tensor) else x for x in arguments]
            for a, b in zip(verify_rejection(*one), together, strict=True):
                assert torch.equal(a[0], b[i])
            alone = sample_gumbel(one[0][:, :1], one[5], one[6], one[7])
            for a, b in zip(alone, drawn, strict=True):
                assert torch.equal(a[0], b[i])


@pytest.mark.parametrize(("purpose", "known"), [(Purpose.NOISE, False), (Purpose.DRAFT, False), (Purpose.DRAFT, True)])
def test_a_chain_is_what_it_is_slot_by_slot(purpose: Purpose, known: bool) -> None:
    s, m, v, excluded = 5, 4, 301, 17
    table, (seed, position) = PairTable(normal(v, v, seed=3)), keys(s)
    temperature, previous, count = torch.tensor([0.0, 0.6, 1.0, 1.0, 0.9]), torch.arange(s) * 50, torch.tensor([4, 0, 2, 4, 1])
    if purpose == Purpose.DRAFT:
        temperature[0] = 1.1
    given = normal(s, m, v)
    given[1], given[2, 2:], given[4, 1:] = NAN, NAN, NAN
    keys_S = temperature, seed, position - 1
    first = (normal(s, 3, v, seed=4)[:, 1:], 0.7) if known else ()  # one row of several per sequence

    def chain(markov):
        q = given.clone()
        return q, *draft_chain(q, markov, previous, count, *keys_S, excluded, purpose, *first)

    made = chain(table), chain(table.__call__)  # as a table, and as any function
    real = torch.arange(m) < count[:, None]
    for q, token, _ in made:
        assert torch.equal(token >= 0, real) and (token != excluded).all() and torch.isneginf(q[real][:, excluded]).all()
    (q, token, lse), (other_q, other_token, other_lse) = made
    drawn_from = first[0][:, 0] * first[1] if known else given[:, 0] + table(previous)
    others = torch.arange(v) != excluded
    torch.testing.assert_close(q[:, 0, others][real[:, 0]], drawn_from[:, others][real[:, 0]])
    torch.testing.assert_close(q[0, 1, others], (given[0, 1] + table(token[0, 0]))[others])
    assert torch.equal(token, other_token) and len(set(token[real].tolist())) > 5
    torch.testing.assert_close(q[real], other_q[real], atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(lse[real], other_lse[real], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 64, 274])
def test_a_draw_that_skips_stretches_is_the_draw_of_the_reference(vocab_size: int) -> None:
    """Also at the ends of the numbers that it is drawn by, and where whole stretches have no weight."""
    from blockroll.kernels.verify.rows import draw

    generator = torch.Generator().manual_seed(vocab_size)
    weight = torch.rand(40, vocab_size, generator=generator) * (torch.rand(40, vocab_size, generator=generator) < 0.3)
    weight[:20, vocab_size // 3 : vocab_size // 2] = 0
    weight[20:, -(vocab_size // 2) :] = 0
    weight[:, vocab_size // 5] += 1e-6
    u = torch.rand(40, generator=generator, dtype=torch.float64)
    u[0], u[1] = 2.0**-33, 1 - 2.0**-33
    got = [draw(row.numpy(), float(row.double().sum()), float(x)) for row, x in zip(weight, u, strict=True)]
    assert got == reference.draw(weight, u).tolist()
    assert (weight[torch.arange(40), got] > 0).all()
    assert draw(torch.zeros(vocab_size).numpy(), 0.0, 0.5) == 0


def test_arguments_of_any_layout_and_width() -> None:
    """Views with gaps, half-precision logits, narrow integers and float32 temperatures are those that are copied from them."""
    p, q, lse, token, count, temperature, seed, anchor, excluded = step(6, 3, 40, excluded=39)
    p, q, temperature = p.half(), q.half(), temperature.float()
    plain = p.float(), q.float(), lse, token, count, temperature.double(), seed, anchor, excluded

    def apart(x: torch.Tensor) -> torch.Tensor:
        return torch.stack((x, x), -1)[..., 0]

    odd = p, q, apart(lse), apart(token), count.int(), apart(temperature), apart(seed), apart(anchor), excluded
    with using("numba"):
        for a, b in zip(verify_rejection(*odd), verify_rejection(*plain), strict=True):
            assert torch.equal(a, b)


def test_matching_accepts_the_tokens_that_would_come_without_drafts(implementation: str) -> None:
    s, m, v = 6, 3, 301
    p, temperature, (seed, anchor) = normal(s, m + 1, v), torch.tensor([0.0, 0.5, 1.0, 1.0, 0.8, 0.0]), keys(s)
    draft_SM = reference.sample_gumbel(p, temperature, seed, anchor + 1).token_SR[:, :m].clone()
    draft_SM[1, 1], draft_SM[2, 0], draft_SM[5, 2] = v - 1, v - 1, v - 1
    count = torch.tensor([3, 3, 3, 0, 2, 3])
    p[3, 1:], draft_SM[3], p[4, 3], draft_SM[4, 2] = NAN, -1, NAN, -1
    got = verify_matching(p, draft_SM, count, temperature, seed, anchor)
    with using("reference"):
        same(got, verify_matching(p, draft_SM, count, temperature, seed, anchor))
    assert got.accepted_S.tolist() == [3, 1, 0, 0, 2, 2]


def test_log_probabilities_are_those_of_verification() -> None:
    """On a CPU to the last bit: `blockroll score` gives what the engine recorded."""
    arguments = step(40, 4, 301)
    p, temperature = arguments[0], arguments[5]
    got = verify_rejection(*arguments)
    committed = got.token_SR >= 0
    wide = temperature[:, None].expand(committed.shape)[committed]
    again = logprobs(p[committed], got.token_SR[committed], wide)
    torch.testing.assert_close(again, reference.logprobs(p[committed], got.token_SR[committed], wide), atol=2e-6, rtol=2e-6)
    with using("numba"):
        assert torch.equal(
            logprobs(p[committed], got.token_SR[committed], wide), verify_rejection(*arguments).logprob_SR[committed]
        )


@pytest.mark.parametrize("sampler", ["lossless", "mixed", "coupled", "ar"])
def test_the_reference_gives_the_tokens_of_the_samplers(sampler: str) -> None:
    s, m, v, mask = 24, 3, 30, 29
    p, q, (_, anchor) = normal(s, m + 1, v), normal(s, m + 1, v)[:, :m] + normal(s, m, v, seed=1) / 6, keys(s)
    params = SamplingParams(sampler=sampler, temperature=0.8, mix_weight=0.3)
    rows = SamplerRows.make([params] * s, range(100, 100 + s))
    common = rows.temperature_S, rows.seed_S
    with using("reference"):
        drafts = draft(rows, q, anchor, mask)
        verdict = verify(rows, p, drafts if sampler != "ar" else Drafts(drafts.token_SM, drafts.count_S), anchor)
        if sampler in ("lossless", "mixed"):
            ours = sample_cdf(q, *common, anchor + 1, mask)
            assert torch.equal(ours.token_SR, drafts.token_SM)
            weight = rows.mix_weight_S if sampler == "mixed" else None
            got = verify_rejection(p, q, ours.lse_SR, ours.token_SR, drafts.count_S, *common, anchor, mask, weight)
            assert torch.equal(got.accepted_S, verdict.accepted_S) and torch.equal(got.token_SR, verdict.token_SR)
            torch.testing.assert_close(got.logprob_SR, verdict.logprob_SR, atol=2e-6, rtol=2e-6)
            torch.testing.assert_close(got.behavior_logprob_SR, verdict.behavior_logprob_SR, atol=2e-6, rtol=2e-6)
            return
        if sampler == "coupled":
            assert torch.equal(sample_gumbel(q, *common, anchor + 1, mask).token_SR, drafts.token_SM)
        target = sample_gumbel(p, *common, anchor + 1)
    accepted = count_matching(target.token_SR[:, :m], drafts.token_SM, drafts.count_S)
    committed = torch.arange(m + 1) <= accepted[:, None]
    assert torch.equal(accepted, verdict.accepted_S)
    assert torch.equal(target.token_SR.where(committed, -1), verdict.token_SR)
    torch.testing.assert_close(target.logprob_SR.where(committed, 0), verdict.logprob_SR, atol=2e-6, rtol=2e-6)
