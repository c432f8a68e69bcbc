"""Packs of bounded size."""

from __future__ import annotations

import random

from blockroll.model.packing import packs


def test_packs_are_full_and_within_the_limit():
    draw = random.Random(0)
    for _ in range(200):
        sizes, limit = [draw.randint(0, 9) for _ in range(draw.randint(0, 12))], draw.randint(1, 15)
        made = list(packs(range(len(sizes)), sizes.__getitem__, limit))
        assert [i for pack in made for i in pack] == list(range(len(sizes))) and all(made)
        totals = [sum(sizes[i] for i in pack) for pack in made]
        assert all(total <= limit or len(pack) == 1 for total, pack in zip(totals, made, strict=True))
        # Whatever begins a pack did not fit into the one before it.
        assert all(total + sizes[later[0]] > limit for total, later in zip(totals, made[1:], strict=False))
