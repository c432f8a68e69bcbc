"""Cut-offs in Triton, in the interpreter, against a sort of the vocabulary: the same sets, ties included."""

from __future__ import annotations

import math

import pytest
import torch
from memory_meter import MemoryMeter

pytest.importorskip("triton")

from blockroll.kernels.cutoffs import reference, triton
from blockroll.kernels.cutoffs.reference import Edges
from blockroll.kernels.launch import record

CUTS = ((0, 0.9, 0.0), (5, 1.0, 0.0), (9, 0.6, 0.02), (0, 1.0, 0.1), (10**6, 0.999, 0.0))
"""top-k, top-p, min-p."""


def columns(cuts) -> tuple[torch.Tensor, ...]:
    top_k, top_p, min_p = zip(*cuts, strict=True)
    wide = torch.float64
    return torch.tensor(top_k), torch.tensor(top_p, dtype=wide), torch.tensor(min_p, dtype=wide)


def same_sets(logits: torch.Tensor, temperature: torch.Tensor, cuts) -> Edges:
    """Both versions keep the same tokens, and cut in place what they do not keep."""
    got, expected = triton.edges(logits, temperature, *cuts), reference.edges(logits, temperature, *cuts)
    x = reference.scaled(logits, temperature)
    kept = reference.inside(x, expected)
    assert torch.equal(reference.inside(x, got), kept) and kept.any(-1).all()
    torch.testing.assert_close(got.logmass_SR, expected.logmass_SR, atol=1e-6, rtol=1e-6)
    mine, its = logits.clone(), logits.clone()
    triton.cut_(mine, temperature, got)
    reference.cut_(its, temperature, expected)
    assert torch.equal(mine, its) and torch.equal(mine > -torch.inf, kept & (logits > -torch.inf))
    return got


KINDS = ("plain", "tied", "equal", "excluded", "zeros", "far", "half")


@pytest.mark.parametrize(
    ("kind", "vocab_size"),
    [("tied", 37), ("far", 19), *(pytest.param(kind, size, marks=pytest.mark.slow) for kind in KINDS for size in (1, 37, 5003))],
)
def test_the_sets_of_a_sort(kind, vocab_size, poisoned_outputs):
    generator = torch.Generator().manual_seed(vocab_size)
    x = torch.randn(len(CUTS), 1, vocab_size, generator=generator) * 3
    if kind == "tied":
        x = (x * 2).round() / 2
    elif kind == "equal":
        x[:] = 1.25
    elif kind == "excluded":
        x[torch.rand(x.shape, generator=generator) < 0.5] = -torch.inf
        x[..., -1] = 0.5
    elif kind == "zeros":
        x = torch.where(x > 0, 0.0, -0.0)
    elif kind == "far":  # top-k's edge lies where weights are 0
        x[..., 1:] = x[..., 1:] * 50 - 1000
    elif kind == "half":
        x = x.half()
    temperature = torch.tensor([1.0, 0.7, 1.3, 0.0, 1.0], dtype=torch.float64)
    same_sets(x, temperature, columns(CUTS))


def test_more_numbers_near_an_edge_than_are_gathered(monkeypatch, poisoned_outputs):
    monkeypatch.setattr(triton, "ROOM", 4)
    x = torch.randn(3, 1, 300, generator=torch.Generator().manual_seed(0))
    x[2] = x[2].round()
    same_sets(x, torch.ones(3, dtype=torch.float64), columns([(0, 0.6, 0.0), (100, 0.8, 0.0), (100, 0.7, 0.0)]))


@pytest.mark.slow
def test_a_large_vocabulary(poisoned_outputs):
    """Peaked, flat, and as bfloat16 rounds it: many ties."""
    x = torch.randn(3, 1, 262272, generator=torch.Generator().manual_seed(3)) * torch.tensor([3.0, 1.0, 3.0])[:, None, None]
    x[2] = x[2].bfloat16().float()
    same_sets(x, torch.ones(3, dtype=torch.float64), columns([(0, 0.95, 0.0), (40, 0.9, 0.0), (0, 0.5, 0.0)]))


@pytest.mark.parametrize("vocab_size", [1 << 19, pytest.param(1 << 22, marks=pytest.mark.slow)])
def test_equal_numbers_of_a_large_vocabulary(vocab_size):
    """The sum of their weights is the largest there is."""
    x, ones = torch.zeros(1, 1, vocab_size), torch.ones(1, dtype=torch.float64)
    found = reference.edges(x, ones, *columns([(0, 0.5, 0.0)]))
    assert int(found.last_SR) == vocab_size // 2 - 1 and float(found.logmass_SR) == pytest.approx(math.log(0.5))


@pytest.mark.slow
def test_the_kernels_find_the_same_among_them(poisoned_outputs):
    same_sets(torch.zeros(1, 1, (1 << 19) + 3), torch.ones(1, dtype=torch.float64), columns([(0, 0.5, 0.0)]))


def edges_on_a_device(sequences: int, rows: int, vocab_size: int):
    """(launches, bytes that the cut-offs hold beside the logits at most)."""
    wide, logits = (torch.empty(sequences, dtype=torch.float64, device="meta"),
                    torch.empty(sequences, rows, vocab_size, device="meta"))
    with record("gfx942") as launches, MemoryMeter() as meter:
        triton.edges(logits, wide, wide.long(), wide, wide)
    return launches, meter.peak


@pytest.mark.parametrize("vocab_size", [274, 262272, (1 << 19) - 1, 1 << 19, 1 << 22])
def test_sums_of_weights_fit_into_63_bits(vocab_size):
    scales = {each.arguments["SCALE"] for each in edges_on_a_device(1, 1, vocab_size)[0] if "SCALE" in each.arguments}
    assert scales == {reference.weight_scale(vocab_size)} and vocab_size * int(scales.pop()) < 1 << 63


def test_edges_take_a_tenth_of_the_memory_of_the_logits():
    """Verify rows of 64 samples. A sort of the vocabulary takes three times as much as the logits."""
    assert edges_on_a_device(64, 16, 262272)[1] < 0.1 * 4 * 64 * 16 * 262272


def test_a_row_does_not_depend_on_its_batch(monkeypatch, poisoned_outputs):
    """Nor on how it is cut into chunks; slices of sequences need no copy."""
    x = torch.randn(2, 2, 40, generator=torch.Generator().manual_seed(1))
    temperature, cuts = torch.full((2,), 0.9, dtype=torch.float64), columns([(0, 0.8, 0.0), (7, 0.9, 0.0)])
    whole = triton.edges(x, temperature, *cuts)
    alone = triton.edges(x[1:2, 1:2], temperature[1:2], *(each[1:2] for each in cuts))
    monkeypatch.setattr(triton, "chunks_of", lambda vocab_size: (16, 3, 4, 4))
    parted = triton.edges(x[:, 1:], temperature, *cuts)
    for every, mine, its in zip(whole, alone, parted, strict=True):
        assert torch.equal(every[1, 1], mine[0, 0]) and torch.equal(every[:, 1:], its)


def test_a_row_of_nan_gives_some_edge(poisoned_outputs):
    x = torch.full((2, 1, 20), torch.nan)
    x[1] = -torch.inf
    triton.edges(x, torch.ones(2, dtype=torch.float64), *columns([(3, 0.9, 0.1), (3, 0.9, 0.1)]))
