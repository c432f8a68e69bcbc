"""Paged attention in Triton (interpreted) against the rule of the layout, row by row."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from blockroll.kernels.attention import Rows, tiles
from blockroll.kernels.attention import rows as tables
from blockroll.kernels.attention import splits as splitting
from blockroll.kernels.attention.triton import paged_attend
from blockroll.model.layout import CLEAN, DecodeRows, TokenLayout, decode
from blockroll.model.visibility import Visibility

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
# The interpreter's bfloat16 is wrong (it truncates), so 16 bits means float16 here.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}


class Pack:
    """Random q, k, v for a decode layout, over a shuffled cache whose unused places hold NaN."""

    def __init__(self, plans, heads=4, kv_heads=2, size=32, page=8, dtype=torch.float32, window=None, seed=0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.layout: TokenLayout = decode(plans, mask_token=3)
        self.window, self.page, self.heads, self.kv_heads, self.dtype = window, page, heads, kv_heads, dtype
        starts = self.layout.start_S.tolist()
        width = max(-(-max(starts) // page), 1) + 1
        needed = [-(-start // page) for start in starts]
        free = torch.randperm(sum(needed) + 3, generator=generator).tolist()
        self.table_SP = torch.full((len(starts), width), 2**30, dtype=torch.int32)
        self.pools = [torch.full(((sum(needed) + 3) * page, kv_heads, size), torch.nan, dtype=dtype) for _ in range(2)]
        self.past = []
        for s, start in enumerate(starts):
            pages = [free.pop() for _ in range(needed[s])]
            self.table_SP[s, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
            place = torch.tensor([pages[p // page] * page + p % page for p in range(start)], dtype=torch.int64)
            kv = [torch.randn(start, kv_heads, size, generator=generator).to(dtype) for _ in range(2)]
            for pool, x in zip(self.pools, kv, strict=True):
                pool[place] = x
            self.past.append(kv)
        T = self.layout.rows
        self.q = torch.randn(T, heads, size, generator=generator).to(dtype)
        self.k, self.v = (torch.randn(T, kv_heads, size, generator=generator).to(dtype) for _ in range(2))
        self.scale = size**-0.5

    def rows(self, batch_invariant=False, splits=None) -> Rows:
        """Args: splits, of the tile with the most keys; None as the host chooses."""
        layout = self.layout
        seen = Visibility.of(layout, 1, {"": self.window})
        with pytest.MonkeyPatch.context() as patch:
            if splits is not None:
                patch.setattr(splitting, "_LEAST_BLOCKS", 1)
                patch.setattr(splitting, "longest_item", lambda blocks_N, *_: -(-int(blocks_N.max()) // splits))
            return Rows.of(
                seen.range_4T[""], seen.first_S1, seen.start_S, self.table_SP, page_size=self.page, heads=self.heads,
                kv_heads=self.kv_heads, dtype=self.dtype, batch_invariant=batch_invariant,
            )  # fmt: skip

    def run(self, rows: Rows) -> torch.Tensor:
        return paged_attend(*self.tensors, rows, self.scale)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.q, self.k, self.v, *self.pools

    def expected(self) -> torch.Tensor:
        """The rule of the layout, in float64, one row after another."""
        layout, window = self.layout, self.window or 2**40
        position, limit = layout.position_T, layout.limit_T
        near = (layout.block_T != CLEAN) | (position > position[:, None] - window)
        fresh = layout.sees() & near
        out = torch.zeros(self.q.shape, dtype=torch.float64)
        for i, s in enumerate(layout.sequence_T.tolist()):
            past = torch.arange(int(layout.start_S[s]))
            seen = (past <= limit[i]) & (past > position[i] - window)
            k, v = (
                torch.cat([cached[seen], new[fresh[i]]]).double().repeat_interleave(self.heads // self.kv_heads, 1)
                for cached, new in zip(self.past[s], (self.k, self.v), strict=True)
            )
            weight = torch.einsum("hd,khd->hk", self.q[i].double(), k).mul(self.scale).softmax(-1)
            out[i] = torch.einsum("hk,khd->hd", weight, v)
        return out


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert not got.isnan().any()
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=TOLERANCE[got.dtype])


MIXED = [
    DecodeRows([5, 6, 7], 37, (1, 2), 4),
    DecodeRows([5], 0, (1,), 4),
    DecodeRows([9], 64, (), 4),
    DecodeRows(list(range(20)), 3, (), 4),
    DecodeRows(list(range(9)), 101, (1, 5, 9), 7),
]


@pytest.mark.parametrize(
    ("dtype", "splits", "window"),
    [
        (torch.float32, 1, None),
        (torch.float32, 3, None),
        (torch.float32, 1, 11),
        (torch.float32, 3, 40),
        (torch.float16, 1, 40),
        (torch.float16, 3, 11),
    ],
)
def test_ragged_pack(dtype, splits, window) -> None:
    pack = Pack(MIXED, dtype=dtype, window=window)
    close(pack.run(pack.rows(splits=splits)), pack.expected())


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "page"), [(8, 2, 128, 32), (3, 1, 24, 5), (6, 2, 16, 1), (2, 2, 80, 64), (2, 1, 16, 16)]
)
def test_odd_sizes(heads, kv_heads, size, page) -> None:
    pack = Pack(MIXED, heads, kv_heads, size, page)
    close(pack.run(pack.rows(splits=2)), pack.expected())


def test_more_heads_of_a_row_than_the_smallest_tile_has() -> None:
    pack = Pack([DecodeRows([3], 9, (), 4), DecodeRows([4], 0, (), 4)], heads=32, kv_heads=1, size=16, page=8)
    close(pack.run(pack.rows()), pack.expected())


@pytest.mark.parametrize("m", [16, 128])
def test_every_tile_gives_the_same(m, monkeypatch) -> None:
    """Tiles of other sizes cut the sequences elsewhere."""
    monkeypatch.setattr(tables, "choose", lambda *chosen: dataclasses.replace(tiles.choose(*chosen), m=m))
    pack = Pack(MIXED)
    close(pack.run(pack.rows()), pack.expected())


def test_strides_between_rows() -> None:
    """q, k and v may be columns of one wider tensor."""
    pack = Pack(MIXED)
    whole = torch.cat([x.flatten(1) for x in (pack.q, pack.k, pack.v)], 1)
    q, k, v = (x.unflatten(1, (-1, 32)) for x in whole.split([128, 64, 64], 1))
    expected = pack.expected()
    pack.q, pack.k, pack.v = q, k, v
    close(pack.run(pack.rows(splits=3)), expected)


@pytest.mark.parametrize("window", [None, 19])
def test_alone_equals_in_a_batch_bit_for_bit(window) -> None:
    """batch_invariant: among others, with longer neighbours and a wider page table, nothing changes."""
    plans = [DecodeRows(list(range(1 + i % 3)), start, (1,), 16) for i, start in enumerate([70, 1100, 0, 1023])]
    pack = Pack(plans, page=32, window=window, heads=4, kv_heads=2, size=16)
    together = pack.run(pack.rows(batch_invariant=True))
    for s in (0, 1):
        own = pack.layout.sequence_T == s
        alone = Pack([plans[s]], page=32, window=window, heads=4, kv_heads=2, size=16)
        alone.q, alone.k, alone.v, alone.pools = pack.q[own], pack.k[own], pack.v[own], pack.pools
        alone.table_SP = pack.table_SP[s : s + 1, : max(-(-plans[s].start // 32), 1)]
        assert torch.equal(alone.run(alone.rows(batch_invariant=True)), together[own])


def test_a_row_that_sees_nothing_gives_zero() -> None:
    pack = Pack(MIXED[:2])
    rows = pack.rows(splits=2)
    rows.range_6T[:, 1] = 0
    out = pack.run(rows)
    assert (out[1] == 0).all()
    expected = pack.expected()
    expected[1] = 0
    close(out, expected)
