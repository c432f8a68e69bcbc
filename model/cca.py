"""Compressed convolutional attention over a token layout (arXiv 2510.04476).

Invariants:
- The convolutions and the delayed value follow parents through one index built per forward (`Plan`), never row order.
- Parameter names are those of `transformers.ZayaForCausalLM`.
- Kernels on an accelerator take a `PagedPlan`, torch and everything with gradients a `Plan`.
- No tensor grows with T * T: a small pack is padded to [S, R] under a mask; a long one stays flat, and the layout's rule is
  asked tile by tile.

Legend: T rows, S sequences, R rows of the longest sequence, L cached positions of the longest one, H query heads,
G key heads, D head size, C = (H + G) * D channels, A = hops + 1 ancestors, W = G * D / 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from ..kernels.attention import LongPack, Rule, attend, paged_attend
from ..kernels.cca import CCAWeights, cca, mix, taps_apart
from ..kernels.linear import linear
from .layout import CLEAN, FROM_TAIL, TokenLayout
from .linear import Linear
from .paged import PagedPlan
from .state import SequenceState

PADDED_PAIRS = 2**24
"""Most (row, key) pairs of a padded pack; a pack without a cache that has more stays flat."""


@dataclass(frozen=True)
class Padded:
    """A pack as a batch of sequences.

    Attributes:
        row_SR: row of the pack at each padded place (0 where padding).
        place_T: flat index into S * R of each row.
        visible: bool[S, R, L + R] by layer type.
    """

    row_SR: torch.Tensor
    place_T: torch.Tensor
    visible: dict[str, torch.Tensor]
    biases: dict[str, torch.Tensor] = field(default_factory=dict)

    def bias(self, kind: str, dtype: torch.dtype) -> torch.Tensor:
        """0 where `visible`, else -inf: made once, or every layer's attention would make it from the booleans."""
        if kind not in self.biases:
            visible = self.visible[kind]
            self.biases[kind] = torch.zeros((), dtype=dtype, device=visible.device).where(visible, -torch.inf)
        return self.biases[kind]

    @classmethod
    def of(cls, layout: TokenLayout, counts_S: torch.Tensor, cached: int, windows: dict[str, int | None]) -> Padded:
        """Args: counts_S, rows of each sequence; the others as in `Plan.of`."""
        device = layout.token_T.device
        first = counts_S.cumsum(0) - counts_S
        longest = int(counts_S.max())
        line = torch.arange(longest, device=device)
        real_SR = line < counts_S[:, None]
        row_SR = torch.where(real_SR, first[:, None] + line, 0)
        place_T = layout.sequence_T * longest + torch.arange(layout.rows, device=device) - first[layout.sequence_T]

        position, limit, block = (x[row_SR] for x in (layout.position_T, layout.limit_T, layout.block_T))
        past = torch.arange(cached, device=device)
        past_clean = (past < layout.start_S[:, None])[:, None] & (past <= limit[..., None])
        fresh_clean = (block == CLEAN)[:, None] & (position[:, None] <= limit[..., None])
        fresh_block = (block != CLEAN)[:, None] & (block[:, None] == block[..., None])
        visible = {}
        for kind, window in windows.items():
            near_past = near_fresh = torch.ones((), dtype=torch.bool, device=device)
            if window is not None:
                near_past = past > position[..., None] - window
                near_fresh = position[:, None] > position[..., None] - window
            fresh = (fresh_clean & near_fresh | fresh_block) & real_SR[:, None]
            visible[kind] = torch.cat([past_clean & near_past, fresh], dim=-1)
        return cls(row_SR, place_T, visible)


def ancestor_index(layout: TokenLayout, hops: int) -> torch.Tensor:
    """int64[T, hops + 1]: each row's ancestors in `[zero row, S * hops tail entries, T rows]`."""
    ancestor_TA = layout.ancestors(hops).cpu().numpy()
    back_TA = FROM_TAIL - ancestor_TA
    tail_TA = 1 + layout.sequence_T.cpu().numpy()[:, None] * hops + back_TA
    outside_TA = np.where(back_TA < hops, tail_TA, 0)
    index_TA = np.where(ancestor_TA >= 0, ancestor_TA + 1 + layout.sequences * hops, outside_TA)
    return torch.from_numpy(index_TA).to(layout.parent_T.device)


@dataclass(frozen=True)
class Plan:
    """What one layout asks of every layer: index tensors and, in one of two forms, who sees whom.

    Attributes:
        ancestor_TA: index into `[zero row, S * hops tail entries, T rows]`.
        hops: tokens the convolutions look back.
        sequences: S.
        padded: of a small pack, or one over a cache.
        flat: of a long pack, by layer type.
    """

    ancestor_TA: torch.Tensor
    hops: int
    sequences: int
    padded: Padded | None
    flat: dict[str, LongPack]

    @classmethod
    def of(cls, layout: TokenLayout, hops: int, cached: int | None, windows: dict[str, int | None]) -> Plan:
        """Build the plan.

        Args:
            cached: L; None without a cache.
            windows: sliding window by layer type; None sees everything.
        """
        sequences = layout.sequences
        counts_S = torch.bincount(layout.sequence_T, minlength=sequences)
        ancestor_TA = ancestor_index(layout, hops)
        if cached is not None or sequences * int(counts_S.max()) ** 2 <= PADDED_PAIRS:
            return cls(ancestor_TA, hops, sequences, Padded.of(layout, counts_S, cached or 0, windows), {})
        rules = {window: Rule(layout.sequence_T, layout.position_T, layout.limit_T, layout.block_T, window)
                 for window in windows.values()}
        packs = {window: LongPack.of(rule) for window, rule in rules.items()}
        return cls(ancestor_TA, hops, sequences, None, {kind: packs[window] for kind, window in windows.items()})


class Projection(nn.Module):
    """Hidden states to queries, keys and values (`self_attn.qkv_proj`)."""

    def __init__(self, config, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        q, kv, bias = self.heads * self.head_dim, self.kv_heads * self.head_dim, config.attention_bias
        self.q_proj = Linear(config.hidden_size, q, bias=bias)
        self.k_proj = Linear(config.hidden_size, kv, bias=bias)
        self.v_proj_current = Linear(config.hidden_size, kv // 2, bias=bias)
        self.v_proj_delayed = Linear(config.hidden_size, kv // 2, bias=bias)
        self.conv_qk_depthwise = nn.Conv1d(q + kv, q + kv, config.cca_time0, groups=q + kv)
        self.conv_qk_grouped = nn.Conv1d(q + kv, q + kv, config.cca_time1, groups=self.heads + self.kv_heads)
        self._packed: tuple[torch.Tensor, torch.Tensor | None] | None = None

    @property
    def _projections(self) -> tuple[Linear, Linear, Linear, Linear]:
        return self.q_proj, self.k_proj, self.v_proj_current, self.v_proj_delayed

    @torch.no_grad()
    def pack(self) -> None:
        """Move the four projections' parameters side by side in memory, for one product where no gradient is asked for, and the
        taps of the convolutions apart. They stay parameters of their own, and what is copied into them is seen. Another device
        or dtype undoes it; where nothing was undone, nothing moves again, as captured steps read where things lie."""
        if self._in_place():
            return

        def side_by_side(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
            whole = torch.cat([parameter.data for parameter in parameters])
            for parameter, part in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
                parameter.data = part
            return whole

        biases = [layer.bias for layer in self._projections if layer.bias is not None]
        weight = side_by_side([layer.weight for layer in self._projections])
        self._packed = weight, side_by_side(biases) if biases else None
        for convolution in (self.conv_qk_depthwise, self.conv_qk_grouped):
            convolution.weight.data = taps_apart(convolution.weight.data)

    def _in_place(self) -> bool:
        """The parameters still lie where `pack` moved them."""
        if self._packed is None:
            return False
        weight, first = self._packed[0], self.q_proj.weight
        return first.data_ptr() == weight.data_ptr() and first.dtype == weight.dtype

    def _whole(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """What `pack` made, while the parameters still lie there."""
        if torch.is_grad_enabled() or not self._in_place():
            return None
        return self._packed

    def forward(self, hidden_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns x_TC, the q/k projections, and the halves of the values: current_TW and delayed_TW."""
        whole = self._whole()
        if whole is not None:
            width = self.kv_heads * self.head_dim // 2
            x_TC, current_TW, delayed_TW = linear(hidden_TD, *whole).split(
                [len(whole[0]) - 2 * width, width, width], dim=-1
            )
            return x_TC, current_TW, delayed_TW
        x_TC = torch.cat([self.q_proj(hidden_TD), self.k_proj(hidden_TD)], dim=-1)
        return x_TC, self.v_proj_current(hidden_TD), self.v_proj_delayed(hidden_TD)

    def weights(self, temperature_G: torch.Tensor) -> CCAWeights:
        """Everything CCA needs beside the projections."""
        depthwise, grouped = self.conv_qk_depthwise, self.conv_qk_grouped
        assert depthwise.bias is not None and grouped.bias is not None
        return CCAWeights(
            depthwise.weight, depthwise.bias, grouped.weight, grouped.bias, temperature_G, self.v_proj_delayed.bias
        )

    def ancestors(
        self, x_TC: torch.Tensor, delayed_TW: torch.Tensor, plan: Plan, state: SequenceState | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x_TAC of each row and its ancestors, and the parent's delayed value."""
        bias = self.v_proj_delayed.bias
        zero_W = delayed_TW.new_zeros(1, delayed_TW.shape[1]) if bias is None else bias[None].to(delayed_TW.dtype)
        if state is None:
            empty = plan.sequences * plan.hops
            tail_NC, tail_NW = x_TC.new_zeros(1 + empty, x_TC.shape[1]), zero_W.expand(1 + empty, -1)
        else:
            tail_SHC, tail_SW = state.read_tail(self.layer)
            tail_NC = torch.cat([x_TC.new_zeros(1, x_TC.shape[1]), tail_SHC.flatten(0, 1)])
            tail_NW = torch.cat([zero_W, tail_SW.repeat_interleave(plan.hops, dim=0)])
        x_TAC = torch.cat([tail_NC, x_TC]).index_select(0, plan.ancestor_TA.flatten()).unflatten(0, (-1, plan.hops + 1))
        return x_TAC, torch.cat([tail_NW, delayed_TW]).index_select(0, plan.ancestor_TA[:, 1])


class QKNorm(nn.Module):
    """Per-key-head temperature of the normalised keys (`self_attn.qk_norm`)."""

    def __init__(self, config) -> None:
        super().__init__()
        self.temp = nn.Parameter(torch.ones(config.num_key_value_heads))


class Attention(nn.Module):
    """CCA attention of one layer (`self_attn`)."""

    def __init__(self, config, layer: int) -> None:
        super().__init__()
        self.layer, self.kind, self.scale = layer, config.layer_types[layer], config.head_dim**-0.5
        self.o_proj = Linear(
            config.num_attention_heads * config.head_dim, config.hidden_size, bias=config.attention_bias
        )
        self.qkv_proj = Projection(config, layer)
        self.qk_norm = QKNorm(config)

    def forward(
        self,
        hidden_TD: torch.Tensor,
        plan: Plan | PagedPlan,
        rope: tuple[torch.Tensor, torch.Tensor],
        state: SequenceState | None,
    ) -> torch.Tensor:
        project = self.qkv_proj
        x, current, delayed = project(hidden_TD)
        weights = project.weights(self.qk_norm.temp)
        if isinstance(plan, PagedPlan):
            pools = None if state is None else state.pools(self.layer)
            q, k, v = cca(x, current, delayed, weights, *rope, plan.places, pools)
            # Without a cache nothing is read from the pools.
            k_pool, v_pool = (k, v) if pools is None else (pools.k, pools.v)
            out_THD = paged_attend(q, k, v, k_pool, v_pool, plan.rows[self.kind], self.scale)
            return self.o_proj(out_THD.flatten(1))
        x_TAC, previous = project.ancestors(x, delayed, plan, state)
        q, k = mix(x_TAC, weights, *rope)
        v = torch.cat([current, previous], dim=-1).unflatten(-1, (-1, project.head_dim))
        q, k = q.to(v.dtype), k.to(v.dtype)
        if plan.padded is None:
            return self.o_proj(plan.flat[self.kind].attend(q, k, v, self.scale).flatten(1))
        row_SR = plan.padded.row_SR
        k_SKGD, v_SKGD = (y.index_select(0, row_SR.flatten()).unflatten(0, row_SR.shape) for y in (k, v))
        if state is not None:
            past_k, past_v = state.read(self.layer, state.longest)
            k_SKGD, v_SKGD = torch.cat([past_k, k_SKGD], dim=1), torch.cat([past_v, v_SKGD], dim=1)
            state.write(self.layer, k, v, x, delayed)
        q_SRHD = q.index_select(0, row_SR.flatten()).unflatten(0, row_SR.shape)
        out_SRHD = attend(q_SRHD, k_SKGD, v_SKGD, plan.padded.bias(self.kind, q.dtype), self.scale)
        return self.o_proj(out_SRHD.flatten(2).flatten(0, 1).index_select(0, plan.padded.place_T))
