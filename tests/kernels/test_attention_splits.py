"""How the keys of a batch are shared out among programs, and what the kernels compile to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from blockroll.kernels.attention.rows import Rows, apart
from blockroll.kernels.attention.splits import INVARIANT_KEYS, MOST_SPLITS, WAVES, Cut, key_blocks
from blockroll.kernels.attention.tiles import INVARIANT_QUERIES, MOST_GROUP, MOST_QUERIES, choose
from blockroll.kernels.launch import record
from blockroll.kernels.shapes import TARGETS

HEADS, GROUPS, PAGE = 8, 2, 32


def rows_of(starts, counts, width: int, arch: str = "gfx942", window: int | None = None, invariant: bool = False) -> Rows:
    """ZAYA1-8B's attention over a table of `width` pages; each sequence runs `counts` clean rows from `starts`."""
    starts, counts = np.asarray(starts), np.broadcast_to(counts, len(starts))
    first = np.concatenate([[0], np.cumsum(counts)])
    position = np.concatenate([start + np.arange(count) for start, count in zip(starts, counts, strict=True)])
    begin = np.maximum(position - window + 1, 0) if window else 0 * position
    range_4T = np.stack([begin, position + 1, 0 * position, 0 * position])
    with record(arch):
        return Rows.of(
            range_4T, first, starts, torch.zeros(len(starts), width, dtype=torch.int32), page_size=PAGE, heads=HEADS,
            kv_heads=GROUPS, dtype=torch.bfloat16, batch_invariant=invariant,
        )  # fmt: skip


def busy(rows: Rows) -> np.ndarray:
    return rows.item_I8.numpy()[rows.item_I8.numpy()[:, 7] > 0]


def longest(rows: Rows) -> int:
    """Key blocks of the longest item."""
    return int((busy(rows)[:, 6] - busy(rows)[:, 5]).max())


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("width", [513, 2048])
def test_one_long_sequence_has_at_most_32_splits(arch: str, width: int) -> None:
    """However wide its table of pages is: a captured step's is up to four times as wide as it need be."""
    rows = rows_of([16384], 1, width, arch)
    splits = int(rows.tile_N4[0, 3])
    assert 16 <= splits <= MOST_SPLITS == 32 and len(busy(rows)) == splits
    assert longest(rows) == -(-257 // splits)


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("counts", [1, 32])
def test_programs_grow_with_all_keys_and_not_with_the_longest_sequence(arch: str, counts: int) -> None:
    starts = [16384, *[512] * 63]
    rows, alone = rows_of(starts, counts, 2048, arch), rows_of(starts[:1], counts, 2048, arch)
    tiles, n = len(rows.tile_N4), rows.cut.tile.n
    blocks = sum(-(-start // n) + -(-counts // n) for start in starts)
    # Rounding leaves each tile at most one item that is shorter than the others.
    assert len(busy(rows)) <= blocks * tiles // len(starts) // longest(rows) + tiles
    # The short ones stay whole, the long one is cut as if it were alone, or as far as the device has programs.
    assert (rows.tile_N4[-1, 3], alone.tile_N4[0, 3] >= rows.tile_N4[0, 3]) == (1, True)
    assert rows.tile_N4[0, 3] >= min(int(alone.tile_N4[0, 3]), 16)
    assert len(rows.item_I8) * GROUPS <= rows.cut.tile.programs + tiles * GROUPS


def test_items_cover_every_key_block_once() -> None:
    """Ragged packs, whole and under a window, over tables of other widths."""
    random = np.random.default_rng(0)
    for trial in range(60):
        starts = random.integers(0, [40, 3000, 40000][trial % 3], random.integers(1, 20))
        counts = random.integers(1, [2, 40, 300][trial % 3], len(starts))
        window, invariant = (None, 700)[trial // 3 % 2], bool(trial // 6 % 2)
        width = -(-int(starts.max()) // PAGE) * int(random.integers(1, 5)) + 1
        rows = rows_of(starts, counts, width, window=window, invariant=invariant)
        cut, n, items = rows.cut, rows.cut.tile.n, busy(rows)
        assert len(rows.item_I8) == cut.capacity(width * PAGE) and len(items) == rows.tile_N4[:, 3].sum()
        for i, (row, count, item, splits) in enumerate(rows.tile_N4.tolist()):
            own = items[item : item + splits]
            sequence, first, opening, own_count, cached = own[0, :5].tolist()
            assert (own[:, :5] == own[0, :5]).all() and (own[:, 7] == splits).all() and 1 <= splits <= MOST_SPLITS
            assert (first + opening, own_count, sequence) == (row, count, cut.sequence_N[i])
            assert cached == -(-int(starts[sequence]) // n)
            past_begin, past_end, clean_begin, clean_end = rows.range_6T[:4, row : row + count].tolist()
            some = [b // n for b, e in zip(past_begin, past_end, strict=True) if e > b]
            some += [cached + b // n for b, e in zip(clean_begin, clean_end, strict=True) if e > b]
            ends = [-(-e // n) for b, e in zip(past_begin, past_end, strict=True) if e > b]
            ends += [cached + -(-e // n) for b, e in zip(clean_begin, clean_end, strict=True) if e > b]
            assert own[0, 5] <= min(some) and own[-1, 6] >= max(ends)
            assert (own[1:, 5] == own[:-1, 6]).all()
            if not invariant:
                assert (own[0, 5], own[-1, 6] - max(ends) < splits) == (min(some), True)


def test_under_batch_invariant_items_follow_from_their_own_sequence() -> None:
    starts, counts = [70, 1100, 0, 40000, 131000], [3, 1, 40, 16, 1]
    together = rows_of(starts, counts, 8192, invariant=True)
    n = together.cut.tile.n
    for s, (start, count) in enumerate(zip(starts, counts, strict=True)):
        alone = busy(rows_of([start], [count], -(-start // PAGE) + 1, invariant=True))
        own = busy(together)
        own = own[own[:, 0] == s]
        assert np.array_equal(own[:, 2:], alone[:, 2:])
        assert (own[:, 5] % (INVARIANT_KEYS // n) == 0).all()
        assert own[:, 7].max() == min(-(-(start + count) // INVARIANT_KEYS), 32) or start > 2**15


def test_a_captured_step_deals_again_within_its_grid() -> None:
    """`deal` writes what `of` would make, at positions anywhere below the table's width."""
    rows = rows_of([2] * 8, 17, 512)
    for starts in (np.full(8, 16000), np.array([16000, 5, 0, 300, 2000, 31, 32, 33])):
        fresh = rows_of(starts, 17, 512)
        rows.range_6T[:], rows.start_S[:] = fresh.range_6T, fresh.start_S
        for pack in (None, rows.cut.fresh_blocks(rows.range_6T.numpy())):
            rows.item_I8[:], rows.tile_N4[:] = -1, -1
            rows.deal(pack)
            assert torch.equal(rows.item_I8, fresh.item_I8) and torch.equal(rows.tile_N4, fresh.tile_N4)


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 3, 17, 32, 48, MOST_GROUP])
def test_a_tile_holds_all_query_heads_of_a_row(arch: str, dtype: torch.dtype, group: int) -> None:
    for rows in (1, 2, 17, 300):
        for invariant in (False, True):
            with record(arch):
                tile = choose(arch, dtype, rows, group, invariant)
            cut = Cut.of(np.array([0, rows]), tile, group, 1, invariant)
            assert tile.m >= group and cut.count_N.sum() == rows and cut.count_N.max() * group <= tile.m


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize(("rows", "most"), [(1, 1), (4, 1), (16, 1), (17, 2), (20, 2), (32, 1), (33, 3)])
def test_few_tiles_read_the_keys_of_a_sequence(arch: str, rows: int, most: int) -> None:
    """Of ZAYA1-8B's schedules: `ar`, `two_pass` and `fused`, of a block of 16."""
    with record(arch):
        tile = choose(arch, torch.bfloat16, rows, HEADS // GROUPS, False)
    assert -(-rows * HEADS // GROUPS // tile.m) <= most


def test_a_tile_that_sees_nothing_has_one_item_of_no_keys() -> None:
    zero_T = np.zeros(6, np.int64)
    begin, end = key_blocks(apart(np.stack([zero_T] * 4), zero_T), np.array([0, 4]), np.zeros(2, np.int64), 32)
    assert (begin == end).all()


@pytest.mark.parametrize("arch", TARGETS)
def test_partial_results_fit_into_what_is_set_aside(arch: str) -> None:
    for batch in (1, 5, 64, 128, 700):
        for rows in (1, 16, 17, 32, 65, 300):
            first = np.arange(batch + 1) * rows
            with record(arch):
                tiles = [choose(arch, torch.bfloat16, rows, HEADS // GROUPS, invariant) for invariant in (False, True)]
            for tile, invariant in zip(tiles, (False, True), strict=True):
                cut = Cut.of(first, tile, HEADS, GROUPS, invariant)
                items = cut.capacity(131072)
                most = (WAVES + 1) * MOST_QUERIES
                if invariant:
                    most = MOST_SPLITS * batch * (rows * HEADS + INVARIANT_QUERIES * GROUPS)
                assert items == len(cut.count_N) or items * GROUPS * tile.m <= most


PROGRAM = """
import json, re, sys
from blockroll.kernels.check import TARGETS, _Driver, _launches
from triton.runtime.driver import driver
driver.set_active(_Driver(TARGETS["gfx942"]))
found = {}
for case, _, each in _launches("gfx942", 0, "attention"):
    name = f"{each.kernel.__name__} {each.arguments['M']}"
    if name in ("paged 16", "paged 64", "combine 16") and name not in found:
        options = {"num_warps": each.warps, "num_stages": each.stages, **each.options}
        made = each.kernel.warmup(**each.arguments, grid=each.grid, **options)
        found[name] = {"ttir": made.asm["ttir"], "isa": made.asm["amdgcn"]}
json.dump(found, sys.stdout)
"""


@pytest.mark.slow
def test_what_is_compiled_for_gfx942(tmp_path: Path) -> None:
    """The main loop issues the loads of the next keys before its products, and waits for memory only behind some of them. No loop
    combines splits."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, cwd=tmp_path,
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads(done.stdout)
    combine = made["combine 16"]
    assert "scf.for" not in combine["ttir"] and "scf.while" not in combine["ttir"] and "s_barrier" not in combine["isa"]
    for name, loads, products in (("paged 16", 5, 8), ("paged 64", 3, 16)):
        loop = first_loop(made[name]["isa"])
        product = next(i for i, line in enumerate(loop) if line.startswith("v_mfma"))
        wait = next(i for i, line in enumerate(loop) if line.startswith("s_waitcnt") and "vmcnt" in line)
        issued = [i for i, line in enumerate(loop) if line.startswith(("buffer_load", "global_load", "s_load"))]
        # Keys of the next block, and the page numbers of the one behind it.
        assert sum(i < product for i in issued) >= loads, name
        assert sum(line.startswith("v_mfma") for line in loop[:wait]) >= products, name
        assert sum(line.startswith("s_barrier") for line in loop) <= 2, name


def first_loop(isa: str) -> list[str]:
    """Instructions of the first loop: of the cached keys that every row sees."""
    lines = [line.strip() for line in isa.splitlines()]
    at = {line.split(":")[0]: i for i, line in enumerate(lines) if line.startswith(".LBB")}
    for i, line in enumerate(lines):
        words = line.split()
        if words and words[0].startswith(("s_cbranch", "s_branch")) and at.get(words[-1], i) < i:
            return lines[at[words[-1]] : i]
    raise AssertionError("no loop")
