"""CCA in Triton (interpreted) against the reference, over packs that begin, continue from a tail, and are not kept."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from blockroll.kernels.cca import NOTHING, CCAInputs, CCAWeights, Places, Pools, cca, reference, taps_apart
from blockroll.kernels.dispatch import using


@pytest.fixture(autouse=True)
def interpreted(poisoned_outputs):
    with using("triton"):
        yield


class Pack:
    """Random projections and weights; a third of the ancestors each in the pack, in the tail and nowhere."""

    def __init__(self, rows, heads=4, kv_heads=2, size=32, rotary=16, times=(2, 2), dtype=torch.float32, before=False):
        draw = torch.Generator().manual_seed(rows)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=draw).to(dtype)

        self.channels, width, ancestors = (heads + kv_heads) * size, kv_heads * size // 2, sum(times) - 1
        # Side by side, as one product of the projections leaves them.
        self.inputs = normal(rows, self.channels + 2 * width).split([self.channels, width, width], 1)
        self.weights = CCAWeights(
            normal(self.channels, 1, times[0]), normal(self.channels), normal(self.channels, size, times[1]) / size**0.5,
            normal(self.channels), normal(kv_heads), normal(width) if before else None,
        )  # fmt: skip
        angle = torch.randn(rows, rotary // 2, generator=draw).repeat(1, 2)
        self.rope = angle.cos().to(dtype), angle.sin().to(dtype)
        entries, positions = 2 * rows + 7, rows + 9
        source = torch.randint(0, rows, (rows, ancestors), generator=draw)
        kind = torch.randint(0, 3, source.shape, generator=draw)
        entry = torch.randint(rows, entries, source.shape, generator=draw)
        source = torch.where(kind == 0, source, torch.where(kind == 1, -2 - entry, NOTHING))
        source[:, 0] = torch.arange(rows)
        write, tail = torch.randperm(positions, generator=draw)[:rows], torch.randperm(rows, generator=draw)
        write[::3], tail[1::3] = NOTHING, NOTHING
        self.places = Places.of(source, write, tail, False, "cpu")
        self.pools = Pools(
            normal(positions, kv_heads, size), normal(positions, kv_heads, size), normal(entries, self.channels),
            normal(entries, width),
        )  # fmt: skip
        unread = torch.ones(entries, dtype=torch.bool).index_fill(0, -2 - source[source < NOTHING], False)
        self.pools.x[unread], self.pools.delayed[unread] = torch.nan, torch.nan

    def run(self, op, places=None, pools=True):
        """Outputs, and the pools afterwards."""
        kept = Pools(*(pool.clone() for pool in self.pools)) if pools else None
        out = op(CCAInputs(*self.inputs, self.weights, *self.rope), places or self.places, kept)
        return *out, *(kept or ())


def close(got, expected, atol: float) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=atol, rtol=atol, equal_nan=True)


@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float16, 1e-2)])
def test_equals_the_reference(rows: int, dtype: torch.dtype, atol: float) -> None:
    pack = Pack(rows, dtype=dtype)
    close(pack.run(cca), pack.run(reference.cca), atol)


def test_taps_apart() -> None:
    """The same weights, laid out as an engine does, give the same to the last bit."""
    pack = Pack(5, times=(3, 2))
    as_they_come = pack.run(cca)
    depthwise, _, grouped, *_ = pack.weights
    pack.weights = pack.weights._replace(depthwise_weight=taps_apart(depthwise), grouped_weight=taps_apart(grouped))
    assert pack.weights.grouped_weight.stride() == (32, 1, 32 * len(grouped))
    assert taps_apart(pack.weights.grouped_weight) is pack.weights.grouped_weight
    close(pack.run(cca), as_they_come, 0.0)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(heads=3, kv_heads=1, size=24, rotary=8),
        dict(heads=2, kv_heads=2, size=16, rotary=16, times=(1, 3)),
        dict(heads=2, kv_heads=1, size=80, rotary=40, times=(3, 2), before=True),
    ],
)
def test_odd_sizes_taps_and_a_biased_delayed_value(sizes) -> None:
    pack = Pack(9, **sizes)
    close(pack.run(cca), pack.run(reference.cca), 1e-5)


def test_tail_writes_that_wait_and_a_pack_without_a_cache() -> None:
    pack = Pack(20)
    apart = dataclasses.replace(pack.places, apart=True)
    for a, b in zip(pack.run(cca, apart), pack.run(cca), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0, equal_nan=True)
    fresh = dataclasses.replace(pack.places, source_TA=pack.places.source_TA.clamp_min(NOTHING))
    close(pack.run(cca, fresh, pools=False), pack.run(reference.cca, fresh, pools=False), 1e-5)


def test_a_row_alone_equals_the_row_among_many() -> None:
    pack = Pack(64)
    with using(batch_invariant=True):
        together = pack.run(cca)
        for i in (0, 40):
            # The row and its ancestors, which then stand elsewhere.
            rows = sorted({i, *(r for r in pack.places.source_TA[i].tolist() if r >= 0)})
            at = torch.full((64,), NOTHING)
            at[rows] = torch.arange(len(rows))
            source = pack.places.source_TA[rows]
            source = torch.where(source >= 0, at[source.clamp_min(0)].to(torch.int32), source)
            places = Places(source, pack.places.write_T[rows], pack.places.tail_T[rows], False)
            inputs = [x[rows] for x in pack.inputs]
            pools = Pools(*(pool.clone() for pool in pack.pools))
            alone = cca(CCAInputs(*inputs, pack.weights, *(x[rows] for x in pack.rope)), places, pools)
            for a, b in zip(alone, together, strict=False):
                assert torch.equal(a[at[i]], b[i])
