"""The samplers' guarantees: distributions against exact enumeration, tokens against decoding without drafts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch

from blockroll.kernels.dispatch import using
from blockroll.kernels.philox import Purpose
from blockroll.kernels.verify import reference
from blockroll.rollout.sampling.processing import process
from blockroll.rollout.sampling.sampler import Drafts, SamplerRows, Verdict, draft, verify
from blockroll.rollout.types import SamplingParams
from blockroll.seeds import sample_seed

N = 200_000
VOCAB, MASK = 8, 7
INF = torch.inf
F64 = torch.float64


@pytest.fixture(autouse=True, params=["reference", "numba"])
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """On torch, and where rows have no cut-offs on what numba compiles."""
    with using(request.param):
        yield


ON_TORCH = pytest.mark.parametrize("implementation", ["reference"], indirect=True)


def logits(seed: int, *shape: int, spread: float = 1.5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def target(row: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Exact probabilities of one row of logits under temperature and cut-offs, in float64."""
    cuts = (params.temperature, params.top_k, params.top_p, params.min_p)
    return process(row[None].to(F64), *(torch.tensor([c]) if isinstance(c, int) else torch.tensor([c], dtype=F64)
                                        for c in cuts))[0].exp()  # fmt: skip


def chi_square(tokens: torch.Tensor, expected: torch.Tensor) -> float:
    """Pearson's statistic per degree of freedom; infinite when an impossible token appears. With 7 degrees of freedom,
    6 is passed by chance once in two million runs."""
    counts = torch.bincount(tokens, minlength=len(expected)).to(F64)
    possible = expected > 0
    if counts[~possible].sum() > 0:
        return float("inf")
    want = expected[possible] * counts.sum()
    return float((((counts[possible] - want) ** 2) / want).sum() / max(int(possible.sum()) - 1, 1))


@cache
def many_rows(params: SamplingParams, n: int, draft_temperature: float = 1.0) -> SamplerRows:
    seeds = torch.randint(0, 2**62, (n,), generator=torch.Generator().manual_seed(5))
    return SamplerRows.make([params] * n, seeds.tolist(), draft_temperature=draft_temperature)


def step(
    params: SamplingParams,
    p: torch.Tensor,
    q: torch.Tensor,
    n: int = N,
    spoil: Callable[[Drafts], Drafts] = lambda drafts: drafts,
    draft_temperature: float = 1.0,
) -> tuple[Drafts, Verdict]:
    """One step of n sequences that share p [R, V] and q [M, V] and differ in their seeds."""
    rows = many_rows(params, n, draft_temperature)
    anchor = torch.arange(n) % 50
    drafts = draft(rows, q.expand(n, *q.shape), anchor, MASK)
    return drafts, verify(rows, p.expand(n, *p.shape).contiguous(), spoil(drafts), anchor)


def one_hot(token: int) -> torch.Tensor:
    return torch.full((VOCAB,), -INF).index_fill(0, torch.tensor(token), 0.0)


HALVES = torch.tensor([1.0, 0.5, 0.2, -INF, -INF, -INF, -INF, -INF])
PAIRS = {
    "unrelated": (logits(0, VOCAB), logits(1, VOCAB)),
    "equal but for the mask token": (logits(2, VOCAB), logits(2, VOCAB)),
    "disjoint": (HALVES, HALVES.roll(4)),
    "p inside q": (HALVES, logits(3, VOCAB)),
    "q one-hot": (logits(4, VOCAB), one_hot(2)),
    "p mostly mask token": (one_hot(MASK).clamp(min=-2), logits(5, VOCAB)),
}
PARAMS = {
    "plain": SamplingParams(),
    "temperature": SamplingParams(temperature=0.6),
    "cut": SamplingParams(temperature=1.4, top_k=5, top_p=0.85, min_p=0.05),
    "mixed": SamplingParams(sampler="mixed", mix_weight=0.5, temperature=0.8),
    "mixed cut": SamplingParams(sampler="mixed", mix_weight=0.3, top_k=4, top_p=0.9),
    "mixed w=1": SamplingParams(sampler="mixed", mix_weight=1.0),
}


def mixture(p: torch.Tensor, q: torch.Tensor, w: float) -> torch.Tensor:
    if w == 1:
        return p.to(F64)
    q = q.index_fill(0, torch.tensor(MASK), -INF)
    return w * p.to(F64) + (1 - w) * q.to(F64)


# A mixture of disjoint supports has no token at all.
NO_TOKEN = [("disjoint", "mixed"), ("disjoint", "mixed cut")]
CASES = [
    (way, pair, kind, draft_temperature)
    for way in ("reference", "numba") for pair in PAIRS for kind in PARAMS for draft_temperature in (1.0, 0.5)
    if (pair, kind) not in NO_TOKEN and not (way == "numba" and "cut" in kind)  # cut-offs are torch's
    and (draft_temperature == 1 or pair == "unrelated")
]  # fmt: skip


@pytest.mark.parametrize(("implementation", "pair", "kind", "draft_temperature"), CASES, indirect=["implementation"])
def test_first_token_has_exactly_the_target_distribution(pair: str, kind: str, draft_temperature: float) -> None:
    (p, q), params = PAIRS[pair], PARAMS[kind]
    m_row = mixture(p, q, params.mix_weight) if params.sampler == "mixed" else p
    drafts, verdict = step(params, torch.stack((p, p)), q[None], draft_temperature=draft_temperature)
    expected = target(m_row, params)
    assert chi_square(verdict.token_SR[:, 0], expected) < 6
    assert (drafts.token_SM != MASK).all()
    # Acceptance is 1 - total variation: drafts are really used, and as often as the rule allows.
    cold = replace(params, temperature=params.temperature * draft_temperature)
    q_drawn = target(q.index_fill(0, torch.tensor(MASK), -INF), cold)
    accepted = (verdict.accepted_S == 1).double().mean().item()
    assert accepted == pytest.approx(torch.minimum(expected, q_drawn).sum().item(), abs=0.006)
    # The bonus row has no draft: plain p, for `mixed` too.
    if accepted > 0.05:
        assert chi_square(verdict.token_SR[verdict.accepted_S == 1, 1], target(p, params)) < 6


def test_sampler_ar_and_coupled_draw_from_p() -> None:
    for params in (SamplingParams(sampler="ar", temperature=0.7), SamplingParams(sampler="coupled", top_p=0.8)):
        _, verdict = step(params, logits(6, 2, VOCAB), logits(7, 1, VOCAB))
        assert chi_square(verdict.token_SR[:, 0], target(logits(6, 2, VOCAB)[0], params)) < 6


def test_later_tokens_are_independent_of_earlier_ones() -> None:
    p, q = logits(8, 3, VOCAB), logits(9, 2, VOCAB)
    for params in (SamplingParams(), SamplingParams(temperature=0.8, top_k=6)):
        _, verdict = step(params, p, q)
        reached = verdict.accepted_S >= 1
        for first in range(VOCAB):
            second = verdict.token_SR[reached & (verdict.token_SR[:, 0] == first), 1]
            if len(second) > 1000:
                assert chi_square(second, target(p[1], params)) < 6
        assert chi_square(verdict.token_SR[verdict.accepted_S == 2, 2], target(p[2], params)) < 6


@ON_TORCH
def test_the_check_sees_a_residual_replaced_by_p(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "residual_weights", lambda logp, logq, drafted: logp.exp())
    for kind in ("plain", "mixed"):
        p, q = PAIRS["unrelated"]
        m_row = mixture(p, q, 0.5) if kind == "mixed" else p
        _, verdict = step(PARAMS[kind], torch.stack((p, p)), q[None])
        assert chi_square(verdict.token_SR[:, 0], target(m_row, PARAMS[kind])) > 100


@ON_TORCH
def test_the_check_sees_a_temperature_of_q_that_was_dropped() -> None:
    p, q = PAIRS["unrelated"]
    without = torch.log_softmax(q.index_fill(0, torch.tensor(MASK), -INF), -1)
    for kind in ("temperature", "mixed"):
        params = PARAMS[kind]
        m_row = mixture(p, q, 0.5) if kind == "mixed" else p
        _, verdict = step(params, torch.stack((p, p)), q[None],
                          spoil=lambda drafts: replace(drafts, logq_SMV=without.expand(N, 1, VOCAB)))  # fmt: skip
        assert chi_square(verdict.token_SR[:, 0], target(m_row, params)) > 100


@ON_TORCH
def test_the_check_sees_an_acceptance_that_shares_its_number_with_the_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shared:
        NOISE, DRAFT, ACCEPT, RESAMPLE = Purpose.NOISE, Purpose.DRAFT, Purpose.DRAFT, Purpose.RESAMPLE

    monkeypatch.setattr(reference, "Purpose", Shared)
    p, q = PAIRS["unrelated"]
    _, verdict = step(PARAMS["plain"], torch.stack((p, p)), q[None])
    assert chi_square(verdict.token_SR[:, 0], target(p, PARAMS["plain"])) > 100


# A policy that is a table: logits of (position, token before it).
WIDE, LENGTH = 19, 40
P_TABLE, Q_TABLE = logits(20, LENGTH + 20, WIDE, WIDE, spread=2), logits(21, LENGTH + 20, WIDE, WIDE, spread=1)
Q_TABLE = 0.7 * P_TABLE + Q_TABLE


def decode(
    params: list[SamplingParams], seeds: list[int], widths: list[int], length: int = LENGTH
) -> tuple[list[list[int]], float]:
    """Sequences of the table policy; M of step i is widths[i % len(widths)]. q knows the anchor but not the drafts
    between, as a mask block does. Returns tokens and drafts accepted per step."""
    rows = SamplerRows.make(params, seeds)
    tokens = [[s % WIDE] for s in range(len(params))]
    anchor = torch.zeros(len(params), dtype=torch.int64)
    last = torch.tensor([row[-1] for row in tokens])
    accepted, steps = 0.0, 0
    while min(len(row) for row in tokens) < length:
        m = widths[steps % len(widths)]
        anchor = torch.tensor([len(row) - 1 for row in tokens]).clamp(max=length)
        last = torch.tensor([row[int(a)] for row, a in zip(tokens, anchor, strict=True)])
        position = anchor[:, None] + 1 + torch.arange(m)
        drafts = draft(rows, Q_TABLE[position, last[:, None]], anchor, WIDE - 1) if m else Drafts.none(len(params))
        before = torch.cat((last[:, None], drafts.token_SM.clamp(min=0)), 1)
        verdict = verify(rows, P_TABLE[anchor[:, None] + 1 + torch.arange(m + 1), before], drafts, anchor)
        for s, row in enumerate(tokens):
            if len(row) <= length:
                row += [t for t in verdict.token_SR[s].tolist() if t >= 0]
        accepted, steps = accepted + verdict.accepted_S.double().mean().item(), steps + 1
    return [row[:length] for row in tokens], accepted / steps


TABLE_PARAMS = [
    {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.0}, {"temperature": 1.3, "top_k": 5},
    {"temperature": 0.8, "min_p": 0.1},
]  # fmt: skip


def test_coupled_gives_the_tokens_of_ar_whatever_is_drafted() -> None:
    kinds = [TABLE_PARAMS[i % len(TABLE_PARAMS)] for i in range(60)]
    seeds = [sample_seed(11, i) for i in range(60)]
    reference, none = decode([SamplingParams(sampler="ar", **kind) for kind in kinds], seeds, [0])
    assert none == 0
    for widths in ([0], [1], [3, 0, 7], [15]):
        got, accepted = decode([SamplingParams(sampler="coupled", **kind) for kind in kinds], seeds, widths)
        assert got == reference
        assert accepted > 0.3 or widths == [0]


def test_greedy_gives_the_argmax_for_every_sampler_but_mixed() -> None:
    seeds = list(range(12))
    want, _ = decode([SamplingParams(sampler="ar", temperature=0.0)] * 12, seeds, [0])
    by_hand = [[s % WIDE] for s in range(12)]
    for row in by_hand:
        while len(row) < LENGTH:
            row.append(int(P_TABLE[len(row), row[-1]].argmax()))
    assert want == by_hand
    for name in ("lossless", "coupled"):
        for widths in ([4], [9, 2]):
            got, accepted = decode([SamplingParams(sampler=name, temperature=0.0)] * 12, seeds, widths)
            assert got == want and accepted > 0.3


def test_a_row_gives_the_same_tokens_alone_and_in_any_batch() -> None:
    names = ("ar", "lossless", "coupled", "mixed")
    params = [SamplingParams(sampler=names[i % 4], **TABLE_PARAMS[i % len(TABLE_PARAMS)]) for i in range(20)]
    seeds = [sample_seed(i, 0) for i in range(20)]
    p, q = logits(30, 20, 6, WIDE), logits(31, 20, 5, WIDE)
    anchor = torch.arange(20) * 3

    def run(index: list[int]) -> tuple[Drafts, Verdict]:
        i = torch.tensor(index)
        rows = SamplerRows.make([params[j] for j in index], [seeds[j] for j in index])
        drafts = draft(rows, q[i], anchor[i], WIDE - 1)
        return drafts, verify(rows, p[i], drafts, anchor[i])

    drafts, verdict = run(list(range(20)))
    assert (drafts.count_S == torch.tensor([0, 5, 5, 5] * 5)).all()
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled_drafts, shuffled_verdict = run(shuffled)
    for where, s in enumerate(shuffled):
        alone_drafts, alone = run([s])
        assert torch.equal(alone_drafts.token_SM[0], drafts.token_SM[s])
        assert torch.equal(shuffled_drafts.token_SM[where], drafts.token_SM[s])
        for name in ("accepted_S", "token_SR"):
            assert torch.equal(getattr(alone, name)[0], getattr(verdict, name)[s])
            assert torch.equal(getattr(shuffled_verdict, name)[where], getattr(verdict, name)[s])
        for name in ("logprob_SR", "behavior_logprob_SR", "support_logmass_SR"):
            torch.testing.assert_close(getattr(alone, name)[0], getattr(verdict, name)[s], atol=1e-6, rtol=0)


def test_padding_may_hold_anything() -> None:
    names = ("ar", "lossless", "coupled", "mixed")
    for kind in TABLE_PARAMS:
        for name in names:
            rows = SamplerRows.make([SamplingParams(sampler=name, **kind)] * 4, [1, 2, 3, 4])
            p, q, anchor = logits(32, 4, 6, WIDE), logits(33, 4, 5, WIDE), torch.tensor([5, 9, 0, 2])
            count = torch.tensor([5, 0, 2, 3]) if name != "ar" else torch.zeros(4, dtype=torch.int64)
            clean = draft(rows, q, anchor, WIDE - 1, count)
            assert torch.equal(clean.token_SM == -1, torch.arange(5) >= count[:, None])
            want = verify(rows, p, clean, anchor)
            p_poisoned = p.masked_fill((torch.arange(6) > count[:, None])[..., None], torch.nan)
            q_poisoned = q.masked_fill((torch.arange(5) >= count[:, None])[..., None], torch.nan)
            drafts = draft(rows, q_poisoned, anchor, WIDE - 1, count)
            got = verify(rows, p_poisoned, drafts, anchor)
            assert torch.equal(drafts.token_SM, clean.token_SM)
            for field in ("accepted_S", "token_SR", "logprob_SR", "behavior_logprob_SR", "support_logmass_SR"):
                assert torch.equal(getattr(got, field), getattr(want, field)), (name, kind, field)
            past = torch.arange(6) > got.accepted_S[:, None]
            assert (got.token_SR[past] == -1).all() and (got.token_SR[~past] >= 0).all()
            for field in ("logprob_SR", "behavior_logprob_SR", "support_logmass_SR"):
                assert getattr(got, field).isfinite().all() and (getattr(got, field)[past] == 0).all()
            assert (got.accepted_S <= count).all()


def test_log_probabilities_of_committed_tokens() -> None:
    p, anchor = logits(34, 30, 6, WIDE), torch.arange(30)
    q = p[:, :5] + logits(35, 30, 5, WIDE, spread=0.5)
    for name in ("ar", "lossless", "coupled", "mixed"):
        for kind in TABLE_PARAMS:
            params = SamplingParams(sampler=name, mix_weight=0.6, **kind)
            rows = SamplerRows.make([params] * 30, list(range(30)))
            drafts = draft(rows, q, anchor, WIDE - 1)
            verdict = verify(rows, p, drafts, anchor)
            seen = 0
            for s in range(30):
                for r in range(int(verdict.accepted_S[s]) + 1):
                    token, row = int(verdict.token_SR[s, r]), p[s, r].to(F64)
                    reference = torch.log_softmax(row / (params.temperature or 1), -1)[token]
                    assert verdict.logprob_SR[s, r].item() == pytest.approx(reference.item(), abs=2e-6)
                    if name == "mixed" and r < drafts.count_S[s]:
                        q_row = q[s, r].to(F64).index_fill(0, torch.tensor(WIDE - 1), -INF)
                        row = 0.6 * row + 0.4 * q_row
                    cut = target(row, params)
                    full = torch.softmax(row / (params.temperature or 1), -1)
                    assert verdict.behavior_logprob_SR[s, r].item() == pytest.approx(cut[token].log().item(), abs=4e-6)
                    mass = full[cut > 0].sum().log().item()
                    assert verdict.support_logmass_SR[s, r].item() == pytest.approx(mass, abs=4e-6)
                    seen += r > 0
            assert seen > 10 or name == "ar"


def test_mixed_with_all_the_weight_on_q_accepts_everything() -> None:
    params = SamplingParams(sampler="mixed", mix_weight=0.0)
    p = logits(36, 4, VOCAB)
    p[:, 2] = -INF  # 0 * -inf must not reach the result
    _, verdict = step(params, p, logits(37, 3, VOCAB), n=500)
    assert (verdict.accepted_S == 3).all() and not verdict.behavior_logprob_SR.isnan().any()


def test_drafts_survive_a_change_of_batch() -> None:
    """Selecting, cutting short and joining drafts changes no verdict."""
    names = ("lossless", "mixed", "coupled", "ar")
    params = [SamplingParams(sampler=names[i % 4], temperature=0.9) for i in range(8)]
    p, q, anchor = logits(40, 8, 6, WIDE), logits(41, 8, 5, WIDE), torch.arange(8)
    rows = SamplerRows.make(params, list(range(8)))
    most = torch.tensor([5, 2, 0, 3, 1, 5, 4, 2])
    whole = draft(rows, q, anchor, WIDE - 1).limit(most)
    want = verify(rows, p, whole, anchor)
    parts = []
    for s in range(8):
        alone = draft(SamplerRows.make([params[s]], [s]), q[s : s + 1], anchor[s : s + 1], WIDE - 1)
        parts.append(alone.limit(most[s : s + 1]))
    joined = Drafts.join([Drafts.join(parts[:3]), *parts[3:]])
    assert torch.equal(joined.token_SM, whole.token_SM) and torch.equal(joined.count_S, whole.count_S)
    order = torch.tensor([6, 0, 3, 1])
    some = SamplerRows.make([params[s] for s in order], order.tolist())
    got = verify(some, p[order], joined.select(order), anchor[order])
    assert torch.equal(got.token_SR, want.token_SR[order])
    assert Drafts.join([Drafts.none(2), Drafts.none(1)]).token_SM.shape == (3, 0)


def test_coupled_noise_belongs_to_the_position_not_to_the_slot() -> None:
    """The same position reached as slot 3 of one step and as slot 1 of another gets the same draft from the same q."""
    rows = SamplerRows.make([SamplingParams(sampler="coupled")], [123])
    q = logits(42, 1, 1, WIDE).expand(1, 4, WIDE)
    late = draft(rows, q, torch.tensor([10]), WIDE - 1).token_SM[0]
    early = draft(rows, q, torch.tensor([12]), WIDE - 1).token_SM[0]
    assert torch.equal(late[2:], early[:2]) and len(set(late.tolist() + early.tolist())) > 1


def test_sample_seed() -> None:
    first_of_splitmix64 = 0xE220A8397B1DCDAF  # the published first output for state 0
    assert sample_seed(0, first_of_splitmix64) == first_of_splitmix64 >> 1
    seeds = {sample_seed(request, sample) for request in (0, 1, 2**63 - 1) for sample in range(1000)}
    assert len(seeds) == 3000 and min(seeds) >= 0 and max(seeds) < 2**63
