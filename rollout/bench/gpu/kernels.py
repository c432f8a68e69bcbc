"""Time of each kernel at a policy's sizes, with the bytes it must move and the FLOPs it must do.

Invariants:
- A call goes through the weights and pages of several layers in turn, as a step does, so that none finds its data in the
  device's cache; the time is that of one layer.
- Bytes count each input read once and each output written once, and weights only of the experts that were chosen.

Legend: S sequences, T rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch

from ....kernels.attention import paged_attend
from ....kernels.cca import CCAInputs, cca
from ....kernels.cutoffs import cut_, edges
from ....kernels.experts import route, route_top1
from ....kernels.residual import Scales, scale_residual_norm
from ....kernels.verify import sample_cdf, sample_gumbel, verify_rejection
from ....model.layout import DecodeRows
from ....model.policy import Policy
from ...planning import kernel_work
from .checks import router_weights
from .parts import FilledCache, ForwardPass, layers, random_policy
from .sizes import Sizes
from .timing import timed

_LAYERS = 8
_CCA_CONTEXT = 20  # cached positions, of which the convolutions look back at two
_BEYOND_CACHE = 256 << 20
"""Bytes a call goes through, several times the last-level cache of the devices."""


class KernelBench:
    """The kernels of one process, by item name (`items`)."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        count = min(_LAYERS, sizes.zaya.num_hidden_layers)
        self.config = replace(
            sizes, config={**sizes.config, "num_hidden_layers": count, "layer_types": ["hybrid"] * count}
        ).zaya
        self.items: dict[str, Callable[[], dict[str, Any]]] = {}
        for batch, rows, context in sizes.attention:
            self.items[f"attention {batch} x {rows} at {context}"] = partial(self.attention, batch, rows, context)
        for rows in sizes.kernel_rows:
            for call in (self.experts, self.router, self.cca, self.residual, self.projections):
                self.items[f"{call.__name__} {rows}"] = partial(call, rows)
        for batch in sizes.batches:
            self.items[f"verify {batch}"] = partial(self.verify, batch)
            self.items[f"head {batch}"] = partial(self.head, batch)
            self.items[f"cutoffs {batch}"] = partial(self.cutoffs, batch)

    @cached_property
    def policy(self) -> Policy:
        """A few layers of the policy."""
        return random_policy(self.config, self.sizes.dtype, self.device)

    @cached_property
    def filled(self) -> FilledCache:
        """Room for the largest attention case, and for the packs of `cca`."""
        block, packs = self.policy.block_size, max(self.sizes.kernel_rows)
        most = max(batch * (context + 3 * rows) for batch, rows, context in self.sizes.attention)
        sequences = max(max(batch for batch, _, _ in self.sizes.attention), packs // block)
        return FilledCache(self.policy, most + packs * (_CCA_CONTEXT + 1), sequences, self.sizes.page_size, block + 1)

    def _randn(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, device=self.device).to(self.sizes.dtype)

    @property
    def _item(self) -> int:
        return self.sizes.dtype.itemsize

    def _per_layer(self, call: Callable[[int], object], work: kernel_work.KernelWork) -> dict[str, Any]:
        count = len(layers(self.policy))
        used = max(1, min(count, -(-_BEYOND_CACHE // max(int(work.bytes), 1))))

        def run() -> None:
            for layer in range(used):
                call(layer)

        row = timed(run, self.sizes, self.device)
        times = {"seconds": row["seconds"] / used, "fastest": row["fastest"] / used}
        return row | times | {"bytes": work.bytes, "flops": work.flops}

    def _pass(self, batch: int, rows: int, context: int) -> ForwardPass:
        block = self.policy.block_size
        proposals = (rows - 1) // block if rows > block else 0
        clean = rows - proposals * block
        levels = tuple(range(1, proposals + 1))
        plans = [DecodeRows([5] * clean, context, levels, block if levels else 0)] * batch
        return ForwardPass.of(self.policy, self.filled.cache, self.filled.held([context] * batch, clean), plans)

    def attention(self, batch: int, rows: int, context: int) -> dict[str, Any]:
        """Paged attention of one layer; verify rows first, mask blocks behind them."""
        step = self._pass(batch, rows, context)
        config, T = self.config, step.layout.rows
        heads, groups, wide = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        q, k, v = self._randn(T, heads, wide), self._randn(T, groups, wide), self._randn(T, groups, wide)
        plan = step.paged.rows["hybrid"]
        pools = [step.view.pools(layer) for layer in range(config.num_hidden_layers)]
        work = kernel_work.attention(config, batch, rows, context, self._item)
        row = self._per_layer(lambda i: paged_attend(q, k, v, pools[i].k, pools[i].v, plan, wide**-0.5), work)
        return row | {"kind": "attention", "batch": batch, "rows": rows, "context": context}

    def experts(self, rows: int) -> dict[str, Any]:
        """Grouped experts, chosen uniformly."""
        config = self.config
        x, weight = self._randn(rows, config.hidden_size), self._randn(rows)
        chosen = torch.randint(0, config.num_experts, (rows,), device=self.device)
        mlp = [layer.mlp.experts for layer in layers(self.policy)]
        work = kernel_work.experts(config, rows, self._item, len(chosen.unique()))
        return self._per_layer(
            lambda i: route_top1(x, chosen, weight, mlp[i].gate_up_proj, mlp[i].down_proj), work
        ) | {"kind": "experts", "rows": rows}

    def router(self, rows: int) -> dict[str, Any]:
        """The choice of an expert."""
        config = self.config
        x, state = self._randn(rows, config.hidden_size), self._randn(rows, config.router_hidden_size)
        weights = [router_weights(config, self.sizes.dtype, self.device) for _ in layers(self.policy)]
        work = kernel_work.router(config, rows, self._item)
        return self._per_layer(lambda i: route(x, state, weights[i], 1e-5), work) | {
            "kind": "router", "rows": rows,
        }  # fmt: skip

    def cca(self, rows: int) -> dict[str, Any]:
        """Convolutions, norm, RoPE and the writes to the cache."""
        block = self.policy.block_size
        width = min(rows, block)
        step = self._pass(rows // width, width, _CCA_CONTEXT)
        rows = step.layout.rows
        attentions = [layer.self_attn for layer in layers(self.policy)]
        x, current, delayed = attentions[0].qkv_proj(self._randn(rows, self.config.hidden_size))
        cos, sin = (y[0] for y in self.policy.model.rotary_emb(x, step.layout.position_T[None], "hybrid"))
        weights = [each.qkv_proj.weights(each.qk_norm.temp) for each in attentions]
        places, pools = step.paged.places, [step.view.pools(layer) for layer in range(len(attentions))]
        work = kernel_work.cca(self.config, rows, self._item)
        return self._per_layer(
            lambda i: cca(CCAInputs(x, current, delayed, weights[i], cos, sin), places, pools[i]), work
        ) | {"kind": "cca", "rows": rows}

    def residual(self, rows: int) -> dict[str, Any]:
        """Scaled residual and norm."""
        width = self.config.hidden_size
        hidden, stream = self._randn(rows, width), torch.randn(rows, width, device=self.device)
        scales, norm = Scales(*(self._randn(width) for _ in range(4))), self._randn(width)
        work = kernel_work.residual(self.config, rows, self._item)
        return self._per_layer(lambda i: scale_residual_norm(hidden, stream, scales, norm, 1e-5), work) | {
            "kind": "residual", "rows": rows,
        }  # fmt: skip

    def projections(self, rows: int) -> dict[str, Any]:
        """The library's products around attention."""
        attentions = [layer.self_attn for layer in layers(self.policy)]
        x = self._randn(rows, self.config.hidden_size)
        out = self._randn(rows, self.config.num_attention_heads * self.config.head_dim)
        work = kernel_work.projections(self.config, rows, self._item)

        def call(i: int) -> None:
            attentions[i].qkv_proj(x)
            attentions[i].o_proj(out)

        return self._per_layer(call, work) | {"kind": "projections", "rows": rows}

    def head(self, batch: int) -> dict[str, Any]:
        """The vocabulary head on one block of rows per sequence."""
        rows = batch * self.policy.block_size
        x = self._randn(rows, self.config.hidden_size)
        row = timed(lambda: self.policy.head(x), self.sizes, self.device)
        work = kernel_work.head(self.config, rows, self._item)
        return row | {"bytes": work.bytes, "flops": work.flops, "kind": "head", "batch": batch, "rows": rows}

    def cutoffs(self, batch: int) -> dict[str, Any]:
        """Top-p of the verify rows. What is cut lies apart: logits that were cut once would have other edges."""
        rows, vocab = self.policy.block_size, self.config.vocab_size
        logits = self._randn(batch, rows, vocab).float()
        apart = logits.clone()
        wide = torch.ones(batch, dtype=torch.float64, device=self.device)
        top_k = torch.zeros(batch, dtype=torch.int64, device=self.device)
        row = timed(
            lambda: cut_(apart, wide, edges(logits, wide, top_k, wide * 0.95, wide * 0)), self.sizes, self.device
        )
        work = kernel_work.cutoffs(self.config, batch * rows)
        return row | {"bytes": work.bytes, "flops": 0.0, "kind": "cutoffs", "batch": batch, "rows": batch * rows}

    def verify(self, batch: int) -> dict[str, Any]:
        """Verification of a block of drafts, and the draw of the next ones; AR's draw beside it."""
        drafts, vocab, device = self.policy.block_size - 1, self.config.vocab_size, self.device
        p, q = self._randn(batch, drafts + 1, vocab).float(), self._randn(batch, drafts, vocab).float()
        temperature = torch.ones(batch, dtype=torch.float64, device=device)
        seed, anchor = torch.arange(batch, device=device), torch.full((batch,), 1000, device=device)
        count = torch.full((batch,), drafts, device=device)
        made = sample_cdf(q, temperature, seed, anchor, vocab - 1)
        # p equal to q accepts every draft, so that all rows count.
        p[:, :drafts] = q
        parts = {
            "verify": lambda: verify_rejection(p, q, made.lse_SR, made.token_SR, count, temperature, seed, anchor, vocab - 1),
            "draft": lambda: sample_cdf(q, temperature, seed, anchor, vocab - 1),
            "ar": lambda: sample_gumbel(p[:, :1], temperature, seed, anchor),
        }  # fmt: skip
        rows, works = {}, kernel_work.verification(self.config, batch, drafts)
        for name, call in parts.items():
            rows[name] = timed(call, self.sizes, device) | {"bytes": works[name].bytes, "flops": 0.0}
        return {"kind": "verify", "batch": batch, "parts": rows}
