"""Every path sees what the rule of the layout says, and follows parents, over random layouts with windows and caches."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from blockroll.kernels.attention import RowRanges, Rows
from blockroll.kernels.cca import NOTHING
from blockroll.kernels.dispatch import using
from blockroll.model import plan as plans
from blockroll.model import visibility
from blockroll.model.backends.packed.plan import PackedPlan
from blockroll.model.layout import CLEAN, FROM_TAIL, DecodeRows, TokenLayout, causal, decode, diffusion
from blockroll.model.paged import PagedPlan
from blockroll.model.plan import PlainPlan
from blockroll.model.visibility import Visibility
from blockroll.rollout.cache import PagedCache
from blockroll.rollout.steps.recurring import RecurringInputs

MASK, HOPS = 39, 2
WINDOWS = {"all": None, "one": 1, "few": 5, "many": 30}
CPU = torch.device("cpu")


def random_rows(draw: random.Random, start: int) -> DecodeRows:
    """A prefill, a step of any schedule, or pass B of `two_pass`."""
    count = draw.randint(1, 8)
    levels = tuple(sorted(draw.sample(range(1, count + 1), draw.randint(0, min(3, count)))))
    return DecodeRows([draw.randrange(4, 39) for _ in range(count)], start, levels, draw.randint(1, 7) if levels else 0)


def decode_layout(seed: int) -> TokenLayout:
    draw = random.Random(seed)
    starts = [draw.choice((0, 0, 1, 2, draw.randint(3, 40))) for _ in range(draw.randint(1, 5))]
    return decode([random_rows(draw, start) for start in starts], MASK)


def training_layout(seed: int) -> TokenLayout:
    draw = random.Random(seed)
    texts, blocks = [], []
    for _ in range(draw.randint(1, 4)):
        n = draw.randint(1, 40)
        texts.append([draw.randrange(4, 39) for _ in range(n)])
        starts = draw.sample(range(1, n + 1), draw.randint(0, min(n, 4)))
        blocks.append([(start, draw.randint(1, 9)) for start in starts])
    return causal(texts) if seed % 4 == 0 else diffusion(texts, blocks, MASK)[0]


def ruled(layout: TokenLayout, window: int | None) -> list[tuple[set[int], set[int]]]:
    """By row: the cached positions and the rows of the pack that it sees, as the layout's rule says."""
    near = torch.full((layout.rows, layout.rows), True)
    if window is not None:
        near = (layout.block_T != CLEAN) | (layout.position_T > layout.position_T[:, None] - window)
    fresh = layout.sees() & near
    seen = []
    for i in range(layout.rows):
        position, limit, start = (int(x) for x in (layout.position_T[i], layout.limit_T[i], layout.start_S[layout.sequence_T[i]]))
        first = 0 if window is None else position - window + 1
        seen.append(({p for p in range(start) if first <= p <= limit}, set(fresh[i].nonzero()[:, 0].tolist())))
    return seen


def of_keys(layout: TokenLayout, range_4T: np.ndarray) -> list[tuple[set[int], set[int]]]:
    """The same from ranges of keys."""
    first, found = np.searchsorted(layout.sequence_T.numpy(), np.arange(layout.sequences)), []
    for i, s in enumerate(layout.sequence_T.tolist()):
        start = int(layout.start_S[s])
        keys = {*range(range_4T[0, i], range_4T[1, i]), *range(range_4T[2, i], range_4T[3, i])}
        found.append(({k for k in keys if k < start}, {int(first[s]) + k - start for k in keys if k >= start}))
    return found


def of_rows(layout: TokenLayout, rows: Rows) -> list[tuple[set[int], set[int]]]:
    """The same from the ranges of the Triton kernel."""
    found = []
    for i, s in enumerate(layout.sequence_T.tolist()):
        a, b, c, d, e, f = rows.range_6T[:, i].tolist()
        first = int(rows.first_S1[s])
        found.append((set(range(a, b)), {first + r for r in (*range(c, d), *range(e, f))}))
    return found


def of_mask(layout: TokenLayout, visible_SRK: torch.Tensor, cached: int) -> list[tuple[set[int], set[int]]]:
    """The same from a padded mask."""
    first, found = np.searchsorted(layout.sequence_T.numpy(), np.arange(layout.sequences)), []
    for i, s in enumerate(layout.sequence_T.tolist()):
        keys = visible_SRK[s, i - int(first[s])].nonzero()[:, 0].tolist()
        found.append(({k for k in keys if k < cached}, {int(first[s]) + k - cached for k in keys if k >= cached}))
    return found


def sources(layout: TokenLayout, hops: int, tail_SH: np.ndarray | None) -> list[list[int]]:
    """Each row and its ancestors, one step along parents after the other."""
    found = []
    for i, s in enumerate(layout.sequence_T.tolist()):
        line, at, cached = [i], i, 0 if tail_SH is None else min(hops, int(layout.start_S[s]))
        back = None
        for _ in range(hops):
            if back is None:
                at = int(layout.parent_T[at])
                back = None if at >= 0 else 0 if at == FROM_TAIL else cached
            else:
                back += 1
            line.append(at if back is None else -2 - int(tail_SH[s, back]) if back < cached else NOTHING)
        found.append(line)
    return found


@pytest.fixture(scope="module")
def cache(make_policy):
    return PagedCache(make_policy(torch.float32), 100, 4, 6, 60)


def view_of(cache: PagedCache, layout: TokenLayout):
    cache.release_all()
    held = [cache.open() for _ in range(layout.sequences)]
    for each, start, count in zip(held, layout.start_S.tolist(), torch.bincount(layout.sequence_T).tolist(), strict=True):
        assert cache.reserve(each, start + count)
    return cache.view(held, layout)


SIZES = dict(heads=4, kv_heads=2, dtype=torch.float32)


@pytest.mark.parametrize("seed", range(25))
def test_over_a_cache(cache, seed):
    layout = decode_layout(seed)
    view = view_of(cache, layout)
    plain = PlainPlan.of(layout, view, HOPS, WINDOWS, CPU)
    paged = PagedPlan.of(layout, view, HOPS, WINDOWS, **SIZES)
    packed = PackedPlan.of(layout, view, HOPS, WINDOWS)
    for number, (kind, window) in enumerate(WINDOWS.items()):
        expected = ruled(layout, window)
        assert of_mask(layout, plain.padded.visible[kind], view.longest) == expected, kind
        assert of_rows(layout, paged.rows[kind]) == expected, kind
        assert of_keys(layout, packed.range_W4T[number]) == expected, kind
    followed = sources(layout, HOPS, view.paging().tail_SH.numpy())
    for source_TA in (plain.source_TA, paged.places.source_TA, packed.source_TA):
        assert source_TA.tolist() == followed


@pytest.mark.parametrize("seed", range(25))
def test_without_a_cache(monkeypatch, seed):
    layout = training_layout(seed)
    padded = PlainPlan.of(layout, None, HOPS, WINDOWS, CPU)
    monkeypatch.setattr(plans, "PADDED_PAIRS", 0)
    flat = PlainPlan.of(layout, None, HOPS, WINDOWS, CPU)
    paged, packed = PagedPlan.of(layout, None, HOPS, WINDOWS, **SIZES), PackedPlan.of(layout, None, HOPS, WINDOWS)
    for number, (kind, window) in enumerate(WINDOWS.items()):
        expected = ruled(layout, window)
        assert of_mask(layout, padded.padded.visible[kind], 0) == expected, kind
        assert of_rows(layout, paged.rows[kind]) == expected, kind
        assert of_keys(layout, packed.range_W4T[number]) == expected, kind
        sees = flat.flat[kind].tiles.ranges.sees(slice(None), slice(None))
        assert [set(line.nonzero()[:, 0].tolist()) for line in sees] == [rows for _, rows in expected], kind
    for source_TA in (padded.source_TA, flat.source_TA, paged.places.source_TA, packed.source_TA):
        assert source_TA.tolist() == sources(layout, HOPS, None)


@pytest.mark.parametrize("seed", range(10))
def test_steps_that_recur(make_policy, seed):
    draw = random.Random(seed)
    rows = random_rows(draw, 0)
    policy = make_policy(torch.float32, layer_types=["hybrid", "hybrid_sliding"], num_hidden_layers=2, sliding_window=4)
    cache = PagedCache(policy, 100, 4, 6, 60)
    with using("triton"):
        inputs = RecurringInputs(policy, cache, rows, 4, 16)
    held, starts = [cache.open() for _ in range(3)], [draw.randint(0, 40) for _ in range(3)]
    for each, start in zip(held, starts, strict=True):
        assert cache.reserve(each, start + len(rows.clean))
    inputs.at(held, starts, None)
    for kind, window in policy.windows.items():
        assert of_rows(inputs.layout, inputs.plan.rows[kind]) == ruled(inputs.layout, window), kind
    layout = decode([DecodeRows(rows.clean, start, rows.proposals, rows.block_length) for start in starts], MASK)
    tail_SH = cache.view(held, layout).paging().tail_SH.numpy()
    assert inputs.plan.places.source_TA[: layout.rows].tolist() == sources(layout, policy.hops, tail_SH)


@pytest.mark.parametrize("size", [1, 3, 16, 64])
def test_tiles_are_exact_about_what_they_leave_out(size):
    for seed in range(12):
        layout = training_layout(seed)
        seen = Visibility.of(layout, HOPS, WINDOWS)
        first_T = seen.by_sequence(seen.first_S1[:-1])
        for range_4T in seen.range_4T.values():
            ranges = RowRanges(torch.from_numpy(range_4T + first_T))
            sees = ranges.sees(slice(None), slice(None))
            some, whole = ranges.tiles(size)
            for i, rows in enumerate(sees.split(size)):
                for j, pairs in enumerate(rows.split(size, dim=1)):
                    assert some[i, j] == pairs.any()
                    assert not whole[i, j] or pairs.all()


@pytest.mark.parametrize("hops", [1, 2, 4])
def test_compiled_and_interpreted_alike(monkeypatch, hops):
    """Where numba is not installed, Python runs the same function."""
    for seed in range(10):
        for layout in (decode_layout(seed), training_layout(seed)):
            tail_SH = np.arange(layout.sequences * hops).reshape(-1, hops)
            compiled = Visibility.of(layout, hops, WINDOWS, tail_SH)
            with monkeypatch.context() as patched:
                patched.setattr(visibility, "compiled_where_installed", lambda function: function)
                interpreted = Visibility.of(layout, hops, WINDOWS, tail_SH)
            assert compiled.source_TA.tolist() == interpreted.source_TA.tolist() == sources(layout, hops, tail_SH)
            for kind in WINDOWS:
                assert np.array_equal(compiled.range_4T[kind], interpreted.range_4T[kind])
            assert np.array_equal(compiled.first_S1, interpreted.first_S1)
            assert np.array_equal(compiled.clean_S, interpreted.clean_S)
