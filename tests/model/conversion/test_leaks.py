"""What a training pack lets through: exactly nothing from other documents, nor from what a mask block is to draft.

The whole network first, then each path from row to row alone: attention, both convolutions, the delayed value, the router's
state. Each is shown to be alive, and to leak where parents are replaced by neighbouring rows (attention: where a limit is one
too far).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from blockroll.model import plan
from blockroll.model.conversion.config import Stage
from blockroll.model.conversion.data import Document
from blockroll.model.conversion.stage import Pack
from blockroll.model.layout import CLEAN, TokenLayout
from blockroll.model.policy import Policy, Routing

STAGE = Stage(name="s", kind="diffusion", tokens=1, block_length=(2, 6), masked_copies=2)
Output = Callable[[Policy, TokenLayout], torch.Tensor]


def training_pack() -> TokenLayout:
    """Three documents, cut as a stage cuts them; the middle one is a conversation of two answers."""
    draw = random.Random(1)
    tokens = [tuple(draw.randrange(4, 39) for _ in range(n)) for n in (13, 16, 4)]
    documents = [Document(tokens[0], 3), Document(tokens[1], 4, ((4, 8), (11, 16))), Document(tokens[2], 1)]
    return Pack.of(documents, STAGE, 39, draw).layout


def logits(policy: Policy, layout: TokenLayout) -> torch.Tensor:
    return policy.head(policy(layout))


def reached(policy: Policy, layout: TokenLayout, rows: torch.Tensor, output: Output = logits) -> torch.Tensor:
    """bool[T]: which rows' embeddings the outputs of `rows` have a gradient to that is not exactly zero."""
    kept: list[torch.Tensor] = []
    hook = policy.model.embed_tokens.register_forward_hook(lambda _, __, out: kept.append(out.requires_grad_(True)) or out)
    try:
        out = output(policy, layout)[rows]
    finally:
        hook.remove()
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
    (gradient,) = torch.autograd.grad((out * weights).sum(), kept)
    return (gradient != 0).any(-1)


def allowed(layout: TokenLayout, block: int) -> torch.Tensor:
    """bool[T]: the block itself and the clean tokens before it in its document."""
    inside = layout.block_T == block
    row = int(torch.nonzero(inside)[0])
    before = (layout.block_T == CLEAN) & (layout.position_T <= layout.limit_T[row])
    return inside | before & (layout.sequence_T == layout.sequence_T[row])


@pytest.mark.parametrize("pairs", [2**24, 0], ids=["padded", "flat"])
def test_a_block_reaches_itself_and_what_is_before_it(make_policy, monkeypatch: pytest.MonkeyPatch, pairs: int) -> None:
    monkeypatch.setattr(plan, "PADDED_PAIRS", pairs)
    policy, layout = make_policy(), training_pack()
    for block in range(int(layout.block_T.max()) + 1):
        assert torch.equal(reached(policy, layout, layout.block_T == block), allowed(layout, block))


def test_clean_rows_reach_no_mask_row_and_nothing_later(make_policy) -> None:
    policy, layout = make_policy(), training_pack()
    for row in torch.nonzero(layout.block_T == CLEAN)[:, 0].tolist():
        before = (layout.sequence_T == layout.sequence_T[row]) & (layout.position_T <= layout.position_T[row])
        expected = before & (layout.block_T == CLEAN)
        assert torch.equal(reached(policy, layout, torch.arange(layout.rows) == row), expected)


def row_by_row(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object) -> torch.Tensor:
    """Attention of each row to itself alone, with a gradient to its query and key."""
    return q + (k + v).repeat_interleave(q.shape[2] // k.shape[2], 2)


@torch.no_grad()
def keep_only(policy: Policy, path: str) -> None:
    """Cut every path from row to row but one; attention is cut by `row_by_row`."""
    for layer in policy.model.layers:
        projection = layer.self_attn.qkv_proj
        for name, conv in (("depthwise", projection.conv_qk_depthwise), ("grouped", projection.conv_qk_grouped)):
            if path not in (name, "router state"):
                conv.weight[..., 0] = 0.0  # the tap of the row before
        if path not in ("delayed value", "router state"):
            projection.v_proj_delayed.weight.zero_()


def routed(policy: Policy, layout: TokenLayout) -> torch.Tensor:
    """The last layer's expert probabilities, which the layer before reaches through the router's state alone."""
    routing = Routing([], [])
    last = policy.model.layers[-1]
    hook = last.register_forward_pre_hook(lambda _, inputs: (inputs[0].detach(), *inputs[1:]))
    try:
        policy(layout, routing=routing)
    finally:
        hook.remove()
    return routing.probs_LTE[-1]


@pytest.mark.parametrize("path", ["attention", "depthwise", "grouped", "delayed value", "router state"])
def test_each_path_alone(make_policy, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    policy, layout = make_policy(), training_pack()
    keep_only(policy, path)
    if path != "attention":
        monkeypatch.setattr(plan, "attend", row_by_row)
    gradients = partial(reached, policy, output=routed if path == "router state" else logits)
    blocks = [layout.block_T == block for block in range(int(layout.block_T.max()) + 1)]
    may = [allowed(layout, block) for block in range(len(blocks))]
    alive = False
    for rows, inside in zip(blocks, may, strict=True):
        seen = gradients(layout, rows)
        assert not (seen & ~inside).any()
        alive |= bool((seen & ~rows).any())
    assert alive

    if path == "attention":
        broken = replace(layout, limit_T=layout.limit_T + (layout.block_T != CLEAN).long())
    else:
        broken = replace(layout, parent_T=(torch.arange(layout.rows) - 1).where(torch.arange(layout.rows) > 0, layout.parent_T))
    leaks = [gradients(broken, rows) & ~inside for rows, inside in zip(blocks, may, strict=True)]
    assert any(leak[layout.block_T == CLEAN].any() for leak in leaks)  # to clean tokens that are to be drafted
    if path != "attention":
        first = (layout.sequence_T == 1) & (layout.position_T == 0) & (layout.block_T == CLEAN)
        assert gradients(broken, first)[layout.sequence_T == 0].any()  # across documents
        assert not gradients(layout, first)[layout.sequence_T == 0].any()
