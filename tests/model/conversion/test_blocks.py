"""Cutting documents into mask blocks."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from blockroll.model.conversion.config import Stage
from blockroll.model.conversion.data import Document, cut_blocks

DOCUMENT = Document(tuple(range(50)), prompt=7)


def cut(**fields) -> list[tuple[int, int]]:
    return cut_blocks(DOCUMENT, Stage(name="d", kind="diffusion", tokens=1, **fields), random.Random(3))


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("lengths", [(16, 16), (4, 32)])
def test_each_copy_covers_everything_after_the_prompt(lengths, copies):
    covered = Counter(p for start, length in cut(block_length=lengths, masked_copies=copies, random_offset=False)
                      for p in range(start, start + length))  # fmt: skip
    assert {covered[p] for p in range(7, 50)} == {copies}
    assert min(covered) == 7


def test_published_recipe_is_aligned():
    assert cut(random_offset=False) == [(7, 16), (23, 16), (39, 16)]


def test_random_offsets_reach_every_alignment():
    stage = Stage(name="d", kind="diffusion", tokens=1, masked_copies=200)
    starts = {start for start, _ in cut_blocks(DOCUMENT, stage, random.Random(0))}
    assert starts == set(range(7, 50))


def test_lengths_stay_in_their_range():
    lengths = {length for _, length in cut(block_length=(4, 9), masked_copies=50)}
    assert lengths == set(range(4, 10))
