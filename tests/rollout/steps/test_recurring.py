"""Inputs of passes that recur equal those of any pass."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch

from blockroll.kernels.dispatch import using
from blockroll.model.layout import DecodeRows, decode
from blockroll.rollout.cache import BlockTable, PagedCache
from blockroll.rollout.steps.recurring import RecurringInputs, bucket

SHAPES = {
    "ar": DecodeRows([5], 0, (), 0),
    "two_pass, first": DecodeRows([5], 0, (1,), 4),
    "two_pass, second": DecodeRows([5] * 4, 0, (), 0),
    "fused": DecodeRows([5] * 4, 0, (1, 3), 4),
}


def leaves(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in leaves(tree[key])]
    return [leaf for field in fields(tree) for leaf in leaves(getattr(tree, field.name))] if is_dataclass(tree) else []


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_number_for_number(make_policy, shape):
    """Sequences anywhere: at the start of a text, short of the hops, across pages, at the end of their pages, and padding."""
    policy = make_policy(torch.float32, layer_types=["hybrid", "hybrid_sliding"], num_hidden_layers=2, sliding_window=6)
    cache, random = PagedCache(policy, 64, 4, 12, 5), np.random.default_rng(0)
    width, sequences = 8, 8
    with using("triton"):
        inputs = RecurringInputs(policy, cache, shape, sequences, width)
        for trial in range(20):
            held, starts = [], []
            for _ in range(random.integers(1, sequences + 1)):
                each, start = cache.open(), int(random.integers(0, 3) if trial % 2 else random.integers(0, 28))
                # The last of its rows may have no page.
                assert cache.reserve(each, min(start + int(random.integers(1, 6)), 32))
                held.append(each)
                starts.append(start)
            first = random.integers(3, 9, len(held)).tolist()
            inputs.at(held, starts, first)
            plans = [
                DecodeRows([token, *shape.clean[1:]], start, shape.proposals, shape.block_length)
                for token, start in zip(first, starts, strict=True)
            ]
            missing = sequences - len(held)
            layout = decode(plans + [shape] * missing, policy.mask_token_id)
            view = cache.view(held + [BlockTable(0)] * missing, layout, width)
            expected = layout, policy.paged_plan(layout, view)
            for mine, its in zip((inputs.layout, inputs.plan), expected, strict=True):
                for got, wanted in zip(leaves(mine), leaves(its), strict=True):
                    # The tokens of padding mean nothing.
                    rows = len(held) * layout.rows // sequences if wanted is layout.token_T else len(wanted)
                    torch.testing.assert_close(got[:rows], wanted[:rows], rtol=0, atol=0)
            for each in held:
                cache.release(each)


def test_buckets():
    sizes = sorted({bucket(n) for n in range(1, 129)})
    assert sizes == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128]
    assert all(n <= bucket(n) <= max(2 * n, 16) for n in range(1, 129))
