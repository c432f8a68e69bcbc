"""The network of `Policy.forward` with its weights folded for decoding on a CPU: library products, and what numba has compiled
between them (`stages`, `attention`).

Invariants:
- Same results as `Policy.forward` over the same layout and cache, up to rounding; `tests/model/test_packed.py` compares.
- What a clean row gives depends on its prefix alone, to the last bit: the log-probabilities of a sample are those of one
  causal pass over its tokens. For this no product has a single row: libraries add those up in another order. (Measured with
  oneMKL, whose products of two rows or more have one order; elsewhere it is the same up to rounding.)
- The weights are copies: after the policy's change, make a new one.

Legend: as in `cca` and `experts`; N = H + G heads, A ancestors, F inner size of an expert, I slots of sorted rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import mm

from ...kernels.verify import PairTable
from ..layout import TokenLayout
from ..policy import Layer, Policy, Routing
from ..state import SequenceState
from . import stages
from .attention import Attention
from .plan import PackedPlan
from .weights import PackedLayer, floor, fold_layer, turned

_MOST_PAIRS = 2**22
"""With fewer pairs of tokens, the Markov head is kept as their table."""
_MOST_SIZES = 256
"""Packs of so many sizes are remembered, not what lies in them."""
_MOST_SPANS = 1024
"""So many pieces of a pack that one expert has been given."""

Angles = tuple[np.ndarray, np.ndarray, int]


class _Memory:
    """Pieces of memory by name, as large as was ever asked for."""

    def __init__(self) -> None:
        self._pieces: dict[str, torch.Tensor] = {}

    def take(self, name: str, *shape: int) -> tuple[torch.Tensor, np.ndarray]:
        """float32 of this shape, as a tensor and as an array; what was taken before under this name may lie there too."""
        count = math.prod(shape)
        piece = self._pieces.get(name)
        if piece is None or len(piece) < count:
            piece = self._pieces[name] = torch.zeros(1 << (count - 1).bit_length())
        tensor = piece[:count].view(shape)
        return tensor, tensor.numpy()


class _Work:
    """Where a pass of T rows works: tensors for the products, and arrays of the same memory for what is between them."""

    def __init__(self, layer: PackedLayer, heads: int, kv_heads: int, rows: int, memory: _Memory) -> None:
        turns, inputs, size = layer.convolution_N_AE_O.shape
        hidden, width, classes = layer.output.shape[1], layer.router_down.shape[1], layer.balance_C.shape[0]
        experts, inner = len(layer.down_E), layer.down_E[0].shape[0]
        # A pack of one row is multiplied as two; an expert's only row has a slot beside its own.
        some, slots, take = max(rows, 2), rows + experts, memory.take
        self.residual, self.unit = take("residual", some, hidden), take("unit", some, hidden)
        self.projected = take("projected", some, layer.projection.shape[1])
        self.x, self.mixed = take("x", turns, some, inputs), take("mixed", turns, some, size)
        self.attended, self.y = take("attended", some, heads * size), take("y", some, hidden)
        self.q, self.k, self.v = (
            take(name, rows, count, size)[1] for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        self.previous = take("previous", rows, kv_heads * size // 2)[1]
        self.states = take("state", some, width), take("state below", some, width)
        self.probs = take("probs", rows, classes)[1]
        self.expert, self.slot = (np.zeros(rows, np.int64) for _ in range(2))
        self.begin = np.zeros(classes + 1, np.int64)
        self.sorted, self.gate_up = take("sorted", slots, hidden), take("gate_up", slots, 2 * inner)
        self.inner, self.out = take("inner", slots, inner), take("out", slots, hidden)
        self.a, self.b, self.e = (np.zeros(width, np.float32) for _ in range(3))
        self._spans: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}

    def span(self, begin: int, end: int) -> tuple[torch.Tensor, ...]:
        """These slots of what experts are given, of gate and up, of their product, and of what experts give."""
        known = self._spans.get((begin, end))
        if known is None:
            if len(self._spans) >= _MOST_SPANS:
                self._spans.clear()
            parts = self.sorted[0], self.gate_up[0], self.inner[0], self.out[0]
            known = self._spans[begin, end] = tuple(part[begin:end] for part in parts)
        return known


class PackedForward:
    """Callable as `Policy.forward` is, and with its heads.

    Attributes:
        markov: the policy's Markov head, looked up where the vocabulary is small; None where it has none.
    """

    def __init__(self, policy: Policy) -> None:
        with torch.inference_mode():
            config, trunk = policy.config, policy.model
            self._policy = policy
            self._heads, self._kv_heads, self._size = (
                config.num_attention_heads, config.num_key_value_heads, config.head_dim,
            )  # fmt: skip
            self._embedded_VD = (
                trunk.embed_tokens.weight + trunk.input_hidden_states_bias
            ) * trunk.input_hidden_states_scale
            self._layers = [fold_layer(layer) for layer in _layers(policy)]
            self._arrays = [_arrays(layer) for layer in self._layers]
            size = config.hidden_size
            self._norm, self._norm_floor = trunk.norm.weight * size**0.5, floor(size, trunk.norm.eps)
            self._head_DV, self._head_bias = turned(policy.lm_head.weight), policy.lm_head.bias
            self._rope: dict[str, Angles] = {}
            self._memory, self._work = _Memory(), dict[int, _Work]()
            self._attention = Attention(self._heads, self._kv_heads, self._size, self._memory.take)
            self.markov: Callable[[torch.Tensor], torch.Tensor] | None = policy.markov
            if policy.markov is not None and config.vocab_size**2 <= _MOST_PAIRS:
                self.markov = PairTable(policy.markov(torch.arange(config.vocab_size)))

    @torch.inference_mode()
    def __call__(
        self, layout: TokenLayout, state: SequenceState | None = None, routing: Routing | None = None
    ) -> torch.Tensor:
        """Final hidden states, hidden_TD, of every row. Without a cache, of clean rows from the start of their documents."""
        plan, rows = PackedPlan.of(layout, state, self._policy.hops, self._policy.windows), layout.rows
        work = self._work_of(rows)
        torch.index_select(self._embedded_VD, 0, layout.token_T, out=work.residual[0][:rows])
        ropes = {kind: self._angles(kind, layout.position_T) for kind in self._policy.windows}
        self._attention.prepare(plan)
        residual, unit = work.residual[1][:rows], work.unit[1][:rows]
        stages.unit(residual, self._layers[0].in_floor, unit)
        floors = [*(layer.in_floor for layer in self._layers[1:]), self._norm_floor]
        for number, (layer, arrays, after) in enumerate(zip(self._layers, self._arrays, floors, strict=True)):
            self._attend(number, layer, arrays, work, plan, ropes[layer.kind], state)
            self._mix(number, layer, arrays, work, rows, after)
            if routing is not None:
                routing.expert_LT.append(torch.from_numpy(work.expert.copy()))
                routing.probs_LTE.append(torch.from_numpy(work.probs.copy()))
        return work.unit[0][:rows] * self._norm

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """As the policy's, of hidden states [..., D]."""
        hidden_RD = hidden.flatten(0, -2)
        count = len(hidden_RD)
        hidden_RD = hidden_RD.expand(2, -1) if count == 1 else hidden_RD
        bias, head_DV = self._head_bias, self._head_DV
        logits_RV = mm(hidden_RD, head_DV) if bias is None else torch.addmm(bias, hidden_RD, head_DV)
        return logits_RV[:count].view(*hidden.shape[:-1], -1)

    def _attend(
        self, number: int, layer: PackedLayer, arrays: dict[str, np.ndarray], work: _Work, plan: PackedPlan, rope: Angles,
        state: SequenceState | None,
    ) -> None:  # fmt: skip
        """From the normed residual to the next one, through attention."""
        rows = len(work.q)
        mm(work.unit[0], layer.projection, out=work.projected[0])
        k_pool, v_pool, x_pool, delayed_pool = _nothing(work) if state is None else [x.numpy() for x in state.pools(number)]
        projected, mixed = work.projected[1][:rows], work.mixed[1]
        stages.gather(
            projected, arrays["projection_bias"], plan.source_TA, plan.tail_T, arrays["before_W"], x_pool, delayed_pool,
            work.x[1], work.previous,
        )  # fmt: skip
        torch.bmm(work.x[0], layer.convolution_N_AE_O, out=work.mixed[0])
        stages.turn(
            mixed, projected, arrays["convolution_bias_NO"], arrays["temperature_N"], *rope, work.previous, plan.write_T,
            k_pool, v_pool, work.q, work.k, work.v,
        )  # fmt: skip
        out_THD = work.attended[1][:rows].reshape(rows, self._heads, self._size)
        self._attention(plan, layer.kind, work.q, work.k, work.v, k_pool, v_pool, out_THD)
        mm(work.attended[0], layer.output, out=work.y[0])
        stages.add_unit(
            work.y[1], arrays["output_bias"], work.residual[1][:rows], arrays["attention_residual_D"], layer.post_floor,
            work.unit[1],
        )  # fmt: skip

    def _mix(
        self, number: int, layer: PackedLayer, arrays: dict[str, np.ndarray], work: _Work, rows: int, after: np.float32
    ) -> None:
        """From the normed residual to the next one, through router and experts."""
        state, below = work.states[number % 2], work.states[1 - number % 2]
        mm(work.unit[0], layer.router_down, out=state[0])
        stages.route(
            state[1][:rows], arrays["router_down_bias"], below[1], arrays["router_scale"], layer.router_floor, arrays["fc1"],
            arrays["fc1_bias"], arrays["fc2"], arrays["fc2_bias"], arrays["router_out"], arrays["balance_C"], work.unit[1],
            work.probs, work.expert, work.slot, work.begin, work.sorted[1], work.a, work.b, work.e,
        )  # fmt: skip
        begin = work.begin.tolist()
        spans = [(e, work.span(*span)) for e, span in enumerate(pairwise(begin[:-1])) if span[1] > span[0]]
        for e, (given, gate_up, _, _) in spans:
            mm(given, layer.gate_up_E[e], out=gate_up)
        stages.activate(work.gate_up[1], begin[-1], work.inner[1])
        for e, (_, _, inner, out) in spans:
            mm(inner, layer.down_E[e], out=out)
        stages.combine(
            work.out[1], work.slot, work.expert, work.probs, arrays["mlp_bias"], work.residual[1][:rows],
            arrays["mlp_residual_D"], after, work.unit[1],
        )  # fmt: skip

    def _work_of(self, rows: int) -> _Work:
        work = self._work.get(rows)
        if work is None:
            if rows > max(self._work, default=0) or len(self._work) >= _MOST_SIZES:
                self._work.clear()  # memory that grows lies elsewhere
            work = self._work[rows] = _Work(self._layers[0], self._heads, self._kv_heads, rows, self._memory)
        return work

    def _angles(self, kind: str, position_T: torch.Tensor) -> Angles:
        """cos_TO and sin_TO over whole heads, and half the features that turn; the sine has the sign of the rotated half."""
        longest = int(position_T.max()) + 1
        known = self._rope.get(kind)
        if known is None or len(known[0]) < longest:
            line = torch.arange(2 ** (longest - 1).bit_length())[None]
            cos, sin = (x[0] for x in self._policy.model.rotary_emb(torch.zeros(1), line, kind))
            half = cos.shape[-1] // 2
            sin = torch.cat([-sin[:, :half], sin[:, half:]], dim=-1)
            known = self._rope[kind] = cos.numpy().copy(), sin.numpy().copy(), half
        position = position_T.numpy()
        return known[0][position], known[1][position], known[2]


def _arrays(layer: PackedLayer) -> dict[str, np.ndarray]:
    """What `stages` takes of a layer."""
    arrays = {name: value.numpy() for name, value in vars(layer).items() if isinstance(value, torch.Tensor)}
    arrays["convolution_bias_NO"] = arrays["convolution_bias_N1O"][:, 0].copy()
    arrays["temperature_N"] = arrays["temperature_N1"][:, 0].copy()
    arrays["before_W"] = arrays["before_W"][0].copy()
    return arrays


def _nothing(work: _Work) -> list[np.ndarray]:
    """Pools that nothing is read from or kept in."""
    return [work.k, work.v, work.projected[1], work.projected[1]]


def _layers(policy: Policy) -> Iterator[Layer]:
    for layer in policy.model.layers:
        assert isinstance(layer, Layer)
        yield layer
