"""Router and grouped experts in Triton (interpreted) against the reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from blockroll.kernels.dispatch import using
from blockroll.kernels.experts import RouterWeights, reference, route, route_top1
from blockroll.kernels.launch import record

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def interpreted(poisoned_outputs):
    with using("triton"):
        yield


def layer(rows: int, d: int, f: int, experts: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    """x_TD, weight_T, gate_up_E2FD, down_EDF, and a generator."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, d, generator=draw)
    weight = torch.rand(rows, generator=draw)
    gate_up = torch.randn(experts, 2 * f, d, generator=draw) / d**0.5
    down = torch.randn(experts, d, f, generator=draw) / f**0.5
    return [tensor.to(dtype) for tensor in (x, weight, gate_up, down)], draw


def compare(x, expert, weight, gate_up, down) -> torch.Tensor:
    got = route_top1(x, expert, weight, gate_up, down)
    expected = reference.route_top1(x, expert, weight, gate_up, down)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, atol=TOLERANCE[x.dtype], rtol=TOLERANCE[x.dtype])
    return got


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("rows, d, f, experts", [(1, 5, 3, 1), (7, 33, 19, 3), (70, 40, 24, 4)])
def test_odd_sizes(rows: int, d: int, f: int, experts: int, invariant: bool, dtype: torch.dtype) -> None:
    (x, weight, gate_up, down), draw = layer(rows, d, f, experts, dtype)
    expert = torch.randint(0, experts + 1, (rows,), generator=draw)
    with using(batch_invariant=invariant):
        compare(x, expert, weight, gate_up, down)


def test_sizes_that_fill_their_tiles() -> None:
    (x, weight, gate_up, down), draw = layer(32, 256, 64, 3)
    compare(x, torch.randint(0, 4, (32,), generator=draw), weight, gate_up, down)


@pytest.mark.parametrize("rows", [300, 600])
def test_more_rows_than_a_block_of_the_sort_and_every_tile_size(rows: int) -> None:
    (x, weight, gate_up, down), draw = layer(rows, 9, 5, 3)
    for experts in (3, 2, 1):
        expert = torch.randint(0, experts + 1, (rows,), generator=draw)
        compare(x, expert, weight, gate_up[:experts], down[:experts])


def test_empty_experts_and_skipped_rows() -> None:
    (x, weight, gate_up, down), _ = layer(40, 12, 8, 4)
    skipped = torch.full((40,), 4)
    assert compare(x, skipped, weight, gate_up, down).eq(0).all()
    compare(x, torch.full((40,), 2), weight, gate_up, down)
    some = skipped.clone()
    some[13] = 3
    got = compare(x, some, weight, gate_up, down)
    assert got[13].ne(0).any() and got[:13].eq(0).all()
    assert route_top1(x[:0], skipped[:0], weight[:0], gate_up, down).shape == (0, 12)


def test_a_poisoned_row_stays_in_its_row() -> None:
    (x, weight, gate_up, down), draw = layer(20, 12, 8, 3)
    expert = torch.randint(0, 4, (20,), generator=draw)
    expert[4] = 1
    clean = route_top1(x, expert, weight, gate_up, down)
    x[4] = torch.nan
    got = route_top1(x, expert, weight, gate_up, down)
    others = torch.arange(20) != 4
    assert got[4].isnan().all() and torch.equal(got[others], clean[others])


def test_a_weight_wider_than_the_rows_widens_the_result() -> None:
    (x, weight, gate_up, down), _ = layer(5, 12, 8, 2, torch.float16)
    compare(x, torch.tensor([0, 1, 2, 1, 0]), weight.float(), gate_up, down)


def test_other_activations_take_the_reference() -> None:
    (x, weight, gate_up, down), _ = layer(5, 12, 8, 2)
    expert = torch.tensor([0, 1, 2, 1, 0])
    got = route_top1(x, expert, weight, gate_up, down, torch.nn.functional.gelu)
    assert torch.equal(got, reference.route_top1(x, expert, weight, gate_up, down, torch.nn.functional.gelu))


def router(d: int, p: int, experts: int, draw: torch.Generator, dtype: torch.dtype, first: bool) -> RouterWeights:
    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(size, generator=draw) * scale).to(dtype)

    return RouterWeights(
        normal(p, d, scale=d**-0.5), normal(p), None if first else normal(p), normal(p), normal(p, p, scale=p**-0.5),
        normal(p), normal(p, p, scale=p**-0.5), normal(p), normal(experts + 1, p), normal(experts + 1, scale=0.1),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("rows, d, p, experts", [(1, 7, 5, 1), (19, 70, 24, 3), (33, 64, 32, 16)])
def test_router(rows: int, d: int, p: int, experts: int, first: bool, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(1)
    weights = router(d, p, experts, draw, dtype, first)
    x = torch.randn(rows, d, generator=draw).to(dtype)
    state = None if first else torch.randn(rows, p, generator=draw).to(dtype)
    got, expected = route(x, state, weights, 1e-5), reference.route(x, state, weights, 1e-5)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for name, a, b in zip(("expert", "weight", "state", "probs"), got, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        if name != "expert":
            torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
    if dtype == torch.float32:
        assert torch.equal(got[0], expected[0])
    # Every choice is the best of its own probabilities, and its weight is read there.
    best = (got[3] + weights.balancing_biases).argmax(-1)
    assert torch.equal(got[0], best) and torch.equal(got[1], got[3].gather(1, best[:, None])[:, 0])


def test_router_prefers_the_lower_of_equal_experts() -> None:
    weights = router(6, 8, 3, torch.Generator().manual_seed(0), torch.float32, True)
    weights = weights._replace(
        out_proj_weight=torch.zeros(4, 8), balancing_biases=torch.tensor([-1.0, 0.5, 0.5, 0.0])
    )
    expert, weight, _, probs = route(torch.randn(3, 6), None, weights, 1e-5)
    assert expert.tolist() == [1, 1, 1] and weight.tolist() == [0.25] * 3 and probs.eq(0.25).all()


def test_a_row_alone_equals_the_row_in_a_batch_of_64() -> None:
    (x, _, gate_up, down), draw = layer(64, 96, 40, 3)
    weights = router(96, 16, 3, draw, torch.float32, False)
    state = torch.randn(64, 16, generator=draw)

    def whole_layer(i: slice) -> tuple[torch.Tensor, ...]:
        expert, weight, hidden, probs = route(x[i], state[i], weights, 1e-5)
        return expert, hidden, probs, route_top1(x[i], expert, weight, gate_up, down)

    with using(batch_invariant=True):
        together = whole_layer(slice(0, 64))
        for row in (0, 21, 63):
            alone = whole_layer(slice(row, row + 1))
            for a, b in zip(alone, together, strict=True):
                assert torch.equal(a[0], b[row])


def products(target: str, rows: int):
    """The launches of ZAYA1-8B's experts on `rows` rows."""

    def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    with record(target) as launches:
        route_top1(empty(rows, 2048), empty(rows, dtype=torch.int64), empty(rows), empty(16, 4096, 2048), empty(16, 2048, 2048))
    return launches


@pytest.mark.parametrize("rows", [1, 32, 264, 1040, 1568, 2048, 8320])
def test_amd_gets_products_of_16_rows_and_programs_that_share_weights_share_a_chiplet(rows: int) -> None:
    options = {"gfx942": {"matrix_instr_nonkdim": 16, "kpack": 2}, "gfx950": {"matrix_instr_nonkdim": 16}, "sm_90": {}}
    for target, expected in options.items():
        for each in products(target, rows)[-2:]:
            assert each.options == expected
            # Programs are dealt to 8 chiplets in the order of the first axis, whose programs read different weights.
            features = each.arguments["F" if each.kernel.__name__ == "_gate_up_kernel" else "D"]
            assert each.grid[0] == features // each.arguments["N"] and each.grid[0] % 8 == 0


@pytest.mark.parametrize("rows, most", [(1568, 1.4), (2048, 1.3), (8320, 1.2)])
def test_padding_of_tiles_that_experts_share_evenly(rows: int, most: float) -> None:
    for target in ("gfx942", "sm_90"):
        for each in products(target, rows)[-2:]:
            # On average half a tile of each expert is empty.
            assert 1 + 16 * each.arguments["M"] / 2 / rows <= most


@pytest.mark.parametrize("rows, sorts", [(1, 0), (264, 0), (512, 0), (520, 1), (2048, 1)])
def test_launches_of_a_layer(rows: int, sorts: int) -> None:
    """The sort is part of the first product where rows are few, and one launch where they are many."""
    names = [each.kernel.__name__ for each in products("gfx942", rows)]
    assert names == [*["_place_kernel"] * sorts, "_gate_up_kernel", "_down_kernel"]
