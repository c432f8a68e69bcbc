"""Bytes that each kernel must move, FLOPs that it must do, and its launches, from a policy's dimensions.

Bytes count each input read once and each output written once, and weights only of the experts that are chosen. Of a policy in
bfloat16: two bytes a number, four in the residual stream and in logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import ZayaConfig

from ...kernels.experts.tiles import expert_tiles
from ...kernels.launch import record
from .attention_work import AttentionCall
from .roofline import SORT_INSIDE, Rates, experts_touched

_LOGIT, _STREAM = 4, 4
"""Bytes of a number."""


class KernelWork(NamedTuple):
    """Work of one call. `attention`: the call where it is attention's. `padding`: how many times the FLOPs tiles do, because some
    of their rows are empty; a roofline does not count it."""

    bytes: float
    flops: float
    launches: int
    attention: AttentionCall | None = None
    padding: float = 1.0

    def seconds(self, rates: Rates) -> float:
        """At these rates: the longer of bytes and FLOPs, and what the launches cost; of attention, see `Rates.attention`."""
        if self.attention is not None:
            beside = (self.bytes - self.attention.bytes) / rates.bytes
            return rates.attention(self.attention) + beside + self.launches * rates.launch
        flops = self.flops if rates.arch is None else self.flops * self.padding
        return max(flops / rates.flops, self.bytes / rates.bytes) + self.launches * rates.launch


def attention(config: ZayaConfig, batch: int, rows: int, context: int, item: int = 2) -> KernelWork:
    """Paged attention of one layer, `rows` rows of each sequence; the second launch combines splits."""
    heads, groups, wide, total = config.num_attention_heads, config.num_key_value_heads, config.head_dim, batch * rows
    call = AttentionCall(heads, groups, wide, batch, rows, context)
    return KernelWork(item * (call.bytes // 2 + 2 * total * heads * wide), call.flops, 2, call)


def experts(config: ZayaConfig, rows: int, item: int = 2, touched: float | None = None) -> KernelWork:
    """Gate and up, down, and a sort above `roofline.SORT_INSIDE` rows; half a tile of each expert is padding. `touched`: how many
    experts are chosen; None for the expected number of a uniform choice."""
    one = 3 * config.hidden_size * config.moe_intermediate_size
    touched = experts_touched(config.num_experts, rows) if touched is None else touched
    moved = item * (one * touched + rows * 2 * (config.hidden_size + config.moe_intermediate_size))
    with record("gfx942"):
        tile, _ = expert_tiles(rows, config.num_experts, torch.bfloat16)
    return KernelWork(moved, 2 * one * rows, 2 + (rows > SORT_INSIDE), padding=1 + touched * tile.m / (2 * rows))


def router(config: ZayaConfig, rows: int, item: int = 2) -> KernelWork:
    """State and choice."""
    wide, classes = config.router_hidden_size, config.num_experts + 1
    count = wide * (config.hidden_size + 2 * wide + classes)
    return KernelWork(item * (count + rows * (config.hidden_size + 2 * wide + classes)), 2 * count * rows, 2)


def cca(config: ZayaConfig, rows: int, item: int = 2) -> KernelWork:
    """Convolutions, norm, RoPE and the writes to the cache."""
    groups, wide = config.num_key_value_heads, config.head_dim
    channels = (config.num_attention_heads + groups) * wide
    grouped = channels * wide * config.cca_time1
    matrices = grouped + channels * (config.cca_time0 + 2) + groups
    return KernelWork(item * (matrices + rows * (2 * channels + 3 * groups * wide)), 2 * rows * grouped, 1)


def residual(config: ZayaConfig, rows: int, item: int = 2) -> KernelWork:
    """Scaled residual and norm."""
    return KernelWork(rows * config.hidden_size * (2 * _STREAM + 2 * item), 0.0, 1)


def projections(config: ZayaConfig, rows: int, item: int = 2) -> KernelWork:
    """The library's products around attention."""
    heads, groups, wide = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    count = config.hidden_size * wide * (2 * heads + 2 * groups)
    return KernelWork(item * (count + 4 * rows * config.hidden_size), 2 * count * rows, 2)


def head(config: ZayaConfig, rows: int, item: int = 2) -> KernelWork:
    """The vocabulary head."""
    hidden, vocab = config.hidden_size, config.vocab_size
    return KernelWork(item * (vocab + rows) * hidden + _LOGIT * rows * vocab, 2 * rows * hidden * vocab, 1)


def cutoffs(config: ZayaConfig, rows: int) -> KernelWork:
    """Cut-offs of rows of logits, in place: four readings find the edges, a fifth one writes."""
    return KernelWork(6 * _LOGIT * rows * config.vocab_size, 0.0, 8)


def verification(config: ZayaConfig, batch: int, drafts: int) -> dict[str, KernelWork]:
    """Verification of a block of drafts, the draw of the next ones, and AR's draw."""
    row = _LOGIT * batch * config.vocab_size
    return {
        "verify": KernelWork(row * (2 * (drafts + 1) + 1), 0.0, 4), "draft": KernelWork(row * drafts, 0.0, 2),
        "ar": KernelWork(row, 0.0, 2),
    }  # fmt: skip
