"""Temperature and cut-offs, against a plain loop over sorted tokens."""

from __future__ import annotations

import math

import pytest
import torch

from blockroll.rollout.sampling import support as by_bisection
from blockroll.rollout.sampling.processing import kept, process, processed


def plain(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> list[float]:
    """Processed probabilities of one row, token by token."""
    order = sorted(range(len(logits)), key=lambda v: (-logits[v], v))
    if temperature == 0:
        return [1.0 if v == order[0] else 0.0 for v in range(len(logits))]
    p = [math.exp((x - max(logits)) / temperature) for x in logits]
    alive = order[:top_k] if top_k else order
    total, mass, nucleus = sum(p[v] for v in alive), 0.0, []
    for v in alive:
        if top_p < 1 and mass >= top_p * total:
            break
        nucleus.append(v)
        mass += p[v]
    alive = [v for v in nucleus if p[v] >= min_p * p[order[0]]]
    total = sum(p[v] for v in alive)
    return [p[v] / total if v in alive else 0.0 for v in range(len(logits))]


def columns(*rows: tuple[float, int, float, float]) -> tuple[torch.Tensor, ...]:
    t, k, p, m = zip(*rows, strict=True)
    f64 = torch.float64
    return torch.tensor(t, dtype=f64), torch.tensor(k), torch.tensor(p, dtype=f64), torch.tensor(m, dtype=f64)


CUTS = [
    (1.0, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0), (0.0, 3, 0.5, 0.1), (0.5, 3, 1.0, 0.0), (1.0, 0, 0.7, 0.0),
    (2.0, 0, 1.0, 0.3), (1.3, 5, 0.8, 0.0), (0.9, 4, 0.9, 0.2), (1.0, 100, 0.999, 0.0), (1.0, 1, 1.0, 0.0),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_row_follows_its_own_parameters(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for vocab_size in (1, 9, 37):
        logits = torch.randn(len(CUTS), vocab_size, generator=generator, dtype=torch.float64) * 2
        got = process(logits.to(dtype), *columns(*CUTS))
        assert got.dtype == dtype
        for row, cut in enumerate(CUTS):
            expected = torch.tensor(plain(logits[row].tolist(), *cut), dtype=torch.float64)
            torch.testing.assert_close(got[row].exp().double(), expected, atol=2e-6, rtol=1e-5)
            assert torch.equal(got[row] == -torch.inf, expected == 0)


def test_ties_keep_the_lower_tokens() -> None:
    logits = torch.zeros(3, 6)
    got = process(logits, *columns((1.0, 2, 1.0, 0.0), (1.0, 0, 0.5, 0.0), (0.0, 0, 1.0, 0.0)))
    kept = (got > -torch.inf).tolist()
    assert kept == [[v < 2 for v in range(6)], [v < 3 for v in range(6)], [v < 1 for v in range(6)]]
    four = process(torch.zeros(1, 4), *columns((1.0, 0, 0.5, 0.0)))  # two quarters reach one half exactly
    assert (four > -torch.inf).tolist() == [[True, True, False, False]]
    mixed = torch.tensor([[0.0, 5.0, 0.0, 5.0, 0.0, 0.0]])
    assert (process(mixed, *columns((1.0, 3, 1.0, 0.0))) > -torch.inf).tolist() == [
        [True, True, False, True] + [False] * 2
    ]


def test_top_p_counts_the_mass_that_top_k_left() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # Of the top two, 4/7 and 3/7: 0.5 needs one; of all four, 0.4 < 0.5 needs two.
    assert (process(logits, *columns((1.0, 2, 0.5, 0.0))) > -torch.inf).sum() == 1
    assert (process(logits, *columns((1.0, 0, 0.5, 0.0))) > -torch.inf).sum() == 2


def test_values_that_cut_nothing_leave_the_row_bit_for_bit() -> None:
    """A row takes the path of the cut when a neighbour is cut; that must not change its own numbers."""
    logits = torch.randn(2, 41, generator=torch.Generator().manual_seed(1)) * 3
    alone = process(logits[:1], *columns((0.8, 0, 1.0, 0.0)))
    beside = processed(logits, *columns((0.8, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0)), any_cut=True)
    assert torch.equal(alone[0], beside.logp[0]) and beside.support_logmass[0] == 0


def test_support_logmass_is_the_mass_inside_the_support() -> None:
    logits = torch.randn(len(CUTS), 23, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    temperature, *cuts = columns(*CUTS)
    got = processed(logits, temperature, *cuts)
    for row, (t, *_) in enumerate(CUTS):
        reference = torch.log_softmax(logits[row] / (t or 1.0), -1)
        torch.testing.assert_close(got.full_logp[row], reference)
        inside = got.logp[row] > -torch.inf
        torch.testing.assert_close(got.support_logmass[row], reference[inside].logsumexp(-1), atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(got.logp[row][inside], (reference - got.support_logmass[row])[inside])


def test_broadcast_parameters_equal_repeated_ones() -> None:
    logits = torch.randn(3, 4, 17, generator=torch.Generator().manual_seed(3))
    parameters = columns(CUTS[3], CUTS[4], CUTS[7])
    got = process(logits, *(column[:, None] for column in parameters))
    for s in range(3):
        for r in range(4):
            assert torch.equal(got[s, r], process(logits[s, r][None], *(column[s : s + 1] for column in parameters))[0])


def test_logits_of_minus_infinity_give_no_nan() -> None:
    logits = torch.tensor([[1.0, -torch.inf, 0.5, -torch.inf]]).expand(len(CUTS), 4)
    got = process(logits, *columns(*CUTS))
    assert not got.isnan().any() and (got[:, [1, 3]] == -torch.inf).all()
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(len(CUTS)))


def test_half_precision_logits_are_widened() -> None:
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(4)).bfloat16()
    parameters = columns((0.7, 3, 1.0, 0.0))
    assert torch.equal(process(logits, *parameters), process(logits.float(), *parameters))


def cut_rows(rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random top_k, top_p and min_p, each absent in some rows."""
    there = torch.rand(3, rows, generator=generator) < 0.6
    top_k = torch.where(there[0], torch.randint(1, 60, (rows,), generator=generator), 0)
    top_p = torch.where(there[1], torch.rand(rows, generator=generator, dtype=torch.float64).clamp(0.01), 1.0)
    return top_k, top_p, torch.where(there[2], torch.rand(rows, generator=generator, dtype=torch.float64) ** 3, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bisection_finds_the_support_of_a_sort(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, few rows at a time: plain rows, rows full of ties, rows of one value, excluded tokens and both zeros."""
    generator = torch.Generator().manual_seed(1)
    for vocab_size, rows in ((1, 20), (2, 60), (40, 400), (3000, 60)):
        monkeypatch.setattr(by_bisection, "_NUMBERS_AT_ONCE", 7 * vocab_size)
        logits = torch.randn(rows, vocab_size, generator=generator, dtype=dtype) * 3
        logits[rows // 4 : rows // 2] = (logits[rows // 4 : rows // 2] * 2).round() / 2
        logits[rows // 2] = 1.25
        excluded = logits[rows // 2 + 1 :: 7, 1:]
        excluded[torch.rand(excluded.shape, generator=generator) < 0.5] = -torch.inf
        logits[-1] = torch.where(logits[-1] > 0, 0.0, -0.0).to(dtype)
        cuts = cut_rows(rows, generator)
        expected = kept(logits, *cuts)
        assert torch.equal(by_bisection.support(logits, *cuts), expected)
        none = torch.zeros_like(cuts[0])
        assert torch.equal(by_bisection.support(logits, none, *cuts[1:], any_top_k=False), kept(logits, none, *cuts[1:]))
        # The parameters of a sequence are those of its rows.
        assert torch.equal(by_bisection.support(logits[:, None], *(each[:, None] for each in cuts))[:, 0], expected)


def test_ties_at_every_edge() -> None:
    """Integer logits: nearly all edges lie among equal numbers."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randint(-3, 3, (2000, 30), generator=generator).float()
    cuts = cut_rows(2000, generator)
    assert torch.equal(by_bisection.support(logits, *cuts), kept(logits, *cuts))


def test_bisection_at_the_vocabulary_of_a_large_policy() -> None:
    """Against a sort over the same masses, float64 sums of float32 exponentials."""
    logits = torch.randn(3, 262144, generator=torch.Generator().manual_seed(3)) * 3
    logits[1] = logits[1].bfloat16().float()  # many ties
    top_p = torch.tensor([0.95, 0.9, 0.5], dtype=torch.float64)
    none = torch.zeros(3, dtype=torch.int64)
    got = by_bisection.support(logits, none, top_p, none.double(), any_top_k=False)
    mass, token = (logits - logits.amax(-1, keepdim=True)).exp().sort(dim=-1, descending=True, stable=True)
    before = mass.double().cumsum(-1) - mass
    kept_sorted = before < top_p[:, None] * mass.double().sum(-1, keepdim=True)
    assert torch.equal(got, torch.zeros_like(got).scatter_(-1, token, kept_sorted))


def test_an_accelerator_neither_sorts_nor_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """And takes rows a few at a time: nothing but the result, and what is made of it once, is as large as all of them."""
    pytest.importorskip("triton")
    from pretend_device import PretendDevice

    logits, cuts = torch.randn(40, 50, generator=torch.Generator().manual_seed(4)) * 3, columns(*CUTS * 4)
    expected = process(logits, *cuts)
    monkeypatch.setattr(by_bisection, "_NUMBERS_AT_ONCE", 4 * 50)
    operations, large = [], []
    with PretendDevice() as device:
        run = device.execute

        def noted(name, call, args, kwargs):
            out = run(name, call, args, kwargs)
            operations.append(name)
            made = out if isinstance(out, tuple) else (out,)
            large.extend(name for x in made if x is not None and x.numel() >= logits.numel())
            return out

        monkeypatch.setattr(device, "execute", noted)
        there = [x.pin_memory().to("cuda:0", non_blocking=True) for x in (logits, *cuts)]
        operations.clear()
        large.clear()
        got = processed(*there, any_cut=True, any_greedy=True).logp
        assert not device.waits
        assert torch.equal(got.cpu(), expected)
    assert "sort" not in operations and "cumsum" in operations
    assert large.count("cumsum") == large.count("exp_") == large.count("__xor__") == 0 and len(large) < 25
