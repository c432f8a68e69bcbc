"""Who sees whom and who follows whom: against brute force, across training and decoding, and for leaks."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from blockroll.kernels.cca import NOTHING
from blockroll.model import layout as layout_module
from blockroll.model.layout import CLEAN, FROM_START, FROM_TAIL, DecodeRows, causal, decode, diffusion
from blockroll.model.visibility import Visibility
from blockroll.rollout.cache import PagedCache

MASK = 3


def text(n, seed=0):
    return torch.randint(4, 40, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_training_layout_by_hand():
    layout, target = diffusion([[5, 6, 7, 8]], [[(1, 2), (3, 3)]], MASK)
    assert layout.token_T.tolist() == [5, 6, 7, 8, 3, 3, 3, 3, 3]
    assert layout.position_T.tolist() == [0, 1, 2, 3, 1, 2, 3, 4, 5]
    assert layout.parent_T.tolist() == [FROM_START, 0, 1, 2, 0, 4, 2, 6, 7]
    assert layout.limit_T.tolist() == [0, 1, 2, 3, 0, 0, 2, 2, 2]
    assert layout.block_T.tolist() == [CLEAN] * 4 + [0, 0, 1, 1, 1]
    assert target.tolist() == [6, 7, 8, -100, 6, 7, 8, -100, -100]


@pytest.mark.parametrize("installed", [True, False])
def test_decode_layout_by_hand(monkeypatch, installed):
    """Where numba is not installed, Python runs the same function."""
    if not installed:
        monkeypatch.setattr(layout_module, "compiled_where_installed", lambda function: function)
    made = decode([
        DecodeRows([5, 6, 7], 10, (1, 3), 2), DecodeRows([], 4, (), 0), DecodeRows([8, 9], 0, (), 0), DecodeRows((), 3, (0,), 2),
    ], mask_token=99)  # fmt: skip
    assert made.token_T.tolist() == [5, 6, 7, 99, 99, 99, 99, 8, 9, 99, 99]
    assert made.position_T.tolist() == [10, 11, 12, 11, 12, 13, 14, 0, 1, 3, 4]
    assert made.sequence_T.tolist() == [0] * 7 + [2, 2, 3, 3]
    assert made.parent_T.tolist() == [FROM_TAIL, 0, 1, 0, 3, 2, 5, FROM_START, 7, FROM_TAIL, 9]
    assert made.limit_T.tolist() == [10, 11, 12, 10, 10, 12, 12, 0, 1, 2, 2]
    assert made.block_T.tolist() == [CLEAN] * 3 + [0, 0, 1, 1] + [CLEAN] * 2 + [2, 2]
    assert made.start_S.tolist() == [10, 4, 0, 3]


def test_sees_is_the_rule_row_by_row():
    layout, _ = diffusion([text(7), text(5, 1)], [[(2, 4), (4, 4)], [(1, 3)]], MASK)
    sees = layout.sees()
    for i in range(layout.rows):
        for j in range(layout.rows):
            same = layout.sequence_T[i] == layout.sequence_T[j]
            clean = layout.block_T[j] == CLEAN
            rule = layout.position_T[j] <= layout.limit_T[i] if clean else layout.block_T[j] == layout.block_T[i]
            assert sees[i, j] == bool(same and rule)


def test_ancestors_follow_parents_into_the_tail():
    layout = decode([DecodeRows([7, 8], 1, (1, 2), 2), DecodeRows([9], 0, (1,), 2)], MASK)
    # rows: 0 1 clean | 2 3 block after row 0 | 4 5 block after row 1 || 6 clean | 7 8 block
    assert layout.parent_T.tolist() == [-1, 0, 0, 2, 1, 4, FROM_START, 6, 7]
    assert Visibility.of(layout, 2, {}, np.array([[10, 11], [12, 13]])).source_TA.tolist() == [
        [0, -12, NOTHING],  # one cached token, in tail entry 10, then nothing
        [1, 0, -12],
        [2, 0, -12],
        [3, 2, 0],
        [4, 1, 0],
        [5, 4, 1],
        [6, NOTHING, NOTHING],
        [7, 6, NOTHING],
        [8, 7, 6],
    ]


@torch.no_grad()
@pytest.mark.parametrize("prefix", [1, 2, 9, 30])
def test_q_of_a_decode_step_is_q_of_training(make_policy, prefix):
    """Every level of `fused`, and pass A of `two_pass`, beside the same block of a training pack."""
    policy = make_policy(torch.float32)
    clean, size, levels = text(prefix + 8), 8, (0, 2, 5)
    cache = PagedCache(policy, pages=20, page_size=4, slots=1, decode_rows=9)
    held = cache.open()
    cache.reserve(held, len(clean))
    if prefix > 1:
        fill = decode([DecodeRows(clean[: prefix - 1], 0, (), 0)], MASK)
        policy(fill, cache.view([held], fill))
        held.length = prefix - 1
    rows = DecodeRows(clean[prefix - 1 : prefix + 7], prefix - 1, tuple(level + 1 for level in levels), size)
    step = decode([rows], MASK)
    decoded = policy.head(policy(step, cache.view([held], step)))[step.block_T != CLEAN].view(len(levels), size, -1)
    for level, q in zip(levels, decoded, strict=True):
        pack, _ = diffusion([clean], [[(prefix + level, size)]], MASK)
        trained = policy.head(policy(pack))[pack.block_T != CLEAN]
        assert (trained - q).abs().max() <= 1e-5
        assert trained.std() > 0.1
    alone = decode([DecodeRows(clean[prefix - 1 : prefix], prefix - 1, (1,), size)], MASK)
    two_pass = policy.head(policy(alone, cache.view([held], alone)))[1:]
    assert (two_pass - decoded[0]).abs().max() <= 1e-5


def leak(policy, layout, rows, clean_rows):
    """Largest gradient of the rows' outputs with respect to the embeddings of `clean_rows`."""
    kept = []
    hook = policy.model.embed_tokens.register_forward_hook(
        lambda _, __, out: kept.append(out.requires_grad_(True)) or out
    )
    try:
        out = policy.head(policy(layout))[rows]
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
        (gradient,) = torch.autograd.grad((out * weights).sum(), kept)
    finally:
        hook.remove()
    return gradient[clean_rows].abs().max().item()


@pytest.fixture
def packed():
    """Two documents; blocks of the first at 6 and 10."""
    return diffusion([text(16), text(12, 5)], [[(6, 4), (10, 8)], [(3, 8)]], MASK)[0]


def test_no_leak_from_later_clean_tokens_or_other_documents(make_policy, packed):
    policy = make_policy()
    for block, start in ((0, 6), (1, 10)):
        rows = packed.block_T == block
        first = packed.sequence_T == 0
        later = first & (packed.block_T == CLEAN) & (packed.position_T >= start)
        earlier = first & (packed.block_T == CLEAN) & (packed.position_T < start)
        assert leak(policy, packed, rows, later) == 0.0
        assert leak(policy, packed, rows, ~first) == 0.0
        assert leak(policy, packed, rows, first & (packed.block_T == 1 - block)) == 0.0
        assert leak(policy, packed, rows, earlier) > 0.0


def test_a_shift_in_place_of_parents_leaks(make_policy, packed):
    """The check above would see a convolution that follows neighbouring rows."""
    shifted = replace(packed, parent_T=torch.arange(packed.rows) - 1)
    rows = packed.block_T == 0
    later = (packed.sequence_T == 0) & (packed.block_T == CLEAN) & (packed.position_T >= 6)
    assert leak(make_policy(), shifted, rows, later) > 0.0


def test_packing_changes_nothing(make_policy):
    policy, texts = make_policy(), [text(n, n) for n in random.Random(0).sample(range(1, 40), 6)]
    together = policy(causal(texts))
    alone = torch.cat([policy(causal([t])) for t in texts])
    assert (together - alone).abs().max() < 1e-12
