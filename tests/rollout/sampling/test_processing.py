"""Temperature and cut-offs, against a plain loop over sorted tokens."""

from __future__ import annotations

import math

import pytest
import torch

from blockroll.rollout.sampling.processing import process, processed


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


def test_ties_at_every_edge() -> None:
    """Integer logits: nearly all edges lie among equal numbers."""
    logits = torch.randint(-3, 3, (40, len(CUTS), 30), generator=torch.Generator().manual_seed(2)).double()
    got = process(logits, *columns(*CUTS))
    for rows, expected in zip(logits.tolist(), got.exp(), strict=True):
        for row, cuts, one in zip(rows, CUTS, expected, strict=True):
            torch.testing.assert_close(one, torch.tensor(plain(row, *cuts), dtype=torch.float64))


def test_an_accelerator_neither_sorts_nor_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from pretend_device import PretendDevice

    logits, cuts = torch.randn(6, 50, generator=torch.Generator().manual_seed(4)) * 3, columns(*CUTS[:6])
    expected = process(logits, *cuts)
    operations = []
    with PretendDevice() as device:
        run = device.execute
        monkeypatch.setattr(device, "execute", lambda name, *rest: operations.append(name) or run(name, *rest))
        there = [x.pin_memory().to("cuda:0", non_blocking=True) for x in (logits, *cuts)]
        operations.clear()
        got = processed(*there, any_cut=True, any_greedy=True).logp
        assert not device.waits
        assert torch.equal(got.cpu(), expected)
    assert "_edge_kernel" in operations and not {"sort", "cumsum", "topk"} & set(operations)
