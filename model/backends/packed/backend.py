"""PackedBackend: the network of `Policy.forward` with its weights folded for decoding on a CPU. Products sum in one order
(`kernels/linear/numba.py`); between them runs what numba compiles (`stages`, `attention`).

Invariants:
- Same results as `Policy.forward` over the same layout and cache, up to rounding; `tests/model/test_packed.py` compares.
- The result of a clean row depends on its prefix alone, to the last bit, so the log-probabilities of a sample are those of one
  causal pass over its tokens. Neither the pack nor a library decides the order of a clean row's sums: of torch, only copies and
  element-wise operations run on clean rows, and the softmax on mask rows.
- The weights are copies, and `refresh` makes them again.

Legend: as in `cca` and `experts`; N = H + G heads, A ancestors, F inner size of an expert, I slots of sorted rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from ....kernels.cca import Pools
from ....kernels.linear import numba as linear
from ....kernels.verify import PairTable
from ...layout import TokenLayout
from ...state import SequenceState
from . import stages
from .attention import Attention
from .plan import PackedPlan
from .weights import PackedLayer, floor, fold_layer, turned

if TYPE_CHECKING:
    from ...policy import Layer, Policy, Routing

_MOST_PAIRS = 2**22
"""With fewer pairs of tokens, the Markov head is kept as their table."""
_MOST_SIZES = 256
"""Sizes of packs whose working memory is kept."""
_ANGLES = 256
"""Positions whose angles are computed at once. The shape is fixed: a library's cosine may depend on the number of values."""

Angles = tuple[np.ndarray, np.ndarray, int]


class _Memory:
    """Pieces of memory by name. A piece is as large as the largest request for it so far.

    Attributes:
        moved: how often a piece was replaced by a larger one.
    """

    def __init__(self) -> None:
        self._pieces: dict[str, torch.Tensor] = {}
        self.moved = 0

    def take(self, name: str, *shape: int) -> tuple[torch.Tensor, np.ndarray]:
        """float32 of this shape, uninitialised, as a tensor and as an array. Requests under one name share their memory."""
        count = math.prod(shape)
        piece = self._pieces.get(name)
        if piece is None or len(piece) < count:
            self.moved += piece is not None
            piece = self._pieces[name] = torch.zeros(1 << (count - 1).bit_length())
        tensor = piece[:count].view(shape)
        return tensor, tensor.numpy()


class _Work:
    """The working memory of a pass of T rows."""

    def __init__(self, layer: PackedLayer, heads: int, kv_heads: int, rows: int, memory: _Memory) -> None:
        turns, size = layer.convolution_bias_NO.shape
        inputs, inner = layer.convolution_NPDW.shape[2], layer.down_EPFW.shape[2]
        hidden, width, classes = len(layer.output_bias), len(layer.router_down_bias), len(layer.balance_C)

        def take(name: str, *shape: int) -> np.ndarray:
            return memory.take(name, *shape)[1]

        self.residual, self.unit = take("residual", rows, hidden), take("unit", rows, hidden)
        self.projected = take("projected", rows, len(layer.projection_bias))
        self.x, self.mixed = take("x", turns, rows, inputs), take("mixed", turns, rows, size)
        self.attended, self.y = take("attended", rows, heads * size), take("y", rows, hidden)
        self.q, self.k, self.v = (
            take(name, rows, count, size) for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        self.previous = take("previous", rows, kv_heads * size // 2)
        self.states = take("state", rows, width), take("state below", rows, width)
        self.probs = take("probs", rows, classes)
        self.expert, self.slot = (np.zeros(rows, np.int64) for _ in range(2))
        self.begin = np.zeros(classes + 1, np.int64)
        self.sorted, self.gate_up = take("sorted", rows, hidden), take("gate_up", rows, 2 * inner)
        self.inner, self.out = take("inner", rows, inner), take("out", rows, hidden)
        self.hidden = take("hidden", rows, width), take("hidden before", rows, width)
        self.line = np.zeros(turns * size, np.float32)


@dataclass(frozen=True)
class _Folded:
    """The weights of one version: the scaled embedding, the layers, the last norm, the head and the Markov head."""

    embedded_VD: torch.Tensor
    layers: list[PackedLayer]
    norm: torch.Tensor
    norm_floor: np.float32
    head_bias: torch.Tensor | None
    head_PDW: np.ndarray
    markov: Callable[[torch.Tensor], torch.Tensor] | None


class PackedBackend:
    """Folded weights of a policy, and where passes over them work. See `backends.Backend`.

    Attributes:
        markov: looks its results up in a table where the vocabulary is small.
    """

    recurs = False

    def __init__(self, policy: Policy) -> None:
        config, self._policy, self._vocabulary = policy.config, policy, policy.config.vocab_size
        self._heads, self._kv_heads, self._size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self._rope: dict[str, Angles] = {}
        self._memory, self._work = _Memory(), dict[int, _Work]()
        self._pools: tuple[Pools, list[list[np.ndarray]]] | None = None
        self._attention = Attention(self._heads, self._kv_heads, self._size, self._memory.take)
        self.refresh()

    @torch.inference_mode()
    def fold(self, policy: Policy) -> _Folded:
        """See `Backend.fold`."""
        trunk, size, vocabulary = policy.model, policy.config.hidden_size, policy.config.vocab_size
        markov: Callable[[torch.Tensor], torch.Tensor] | None = policy.markov
        if policy.markov is not None and vocabulary**2 <= _MOST_PAIRS:
            markov = PairTable(policy.markov(torch.arange(vocabulary)))
        bias = policy.lm_head.bias
        return _Folded(
            embedded_VD=(trunk.embed_tokens.weight + trunk.input_hidden_states_bias) * trunk.input_hidden_states_scale,
            layers=[fold_layer(layer) for layer in _layers(policy)],
            norm=trunk.norm.weight * size**0.5,
            norm_floor=floor(size, trunk.norm.eps),
            head_bias=None if bias is None else bias.detach().clone(),
            head_PDW=linear.pack(turned(policy.lm_head.weight)),
            markov=markov,
        )

    def refresh(self, folded: _Folded | None = None) -> None:
        """See `Backend.refresh`."""
        weights = self.fold(self._policy) if folded is None else folded
        self._embedded_VD, self._layers = weights.embedded_VD, weights.layers
        self._norm, self._norm_floor = weights.norm, weights.norm_floor
        self._head_bias, self._head_PDW, self.markov = weights.head_bias, weights.head_PDW, weights.markov

    def prepare(self, layout: TokenLayout, state: SequenceState | None = None) -> tuple[TokenLayout, PackedPlan]:
        """See `Backend.prepare`. Without a cache, of clean rows from the start of their documents."""
        return layout, PackedPlan.of(layout, state, self._policy.hops, self._policy.windows)

    @torch.inference_mode()
    def forward(
        self, layout: TokenLayout, plan: PackedPlan, state: SequenceState | None = None, routing: Routing | None = None
    ) -> torch.Tensor:
        """See `Backend.forward`."""
        work = self._work_of(layout.rows)
        torch.index_select(self._embedded_VD, 0, layout.token_T, out=torch.from_numpy(work.residual))
        pools = [_nothing(work)] * len(self._layers) if state is None else self._pools_of(state)
        ropes = {kind: self._angles(kind, layout.position_T) for kind in self._policy.windows}
        self._attention.prepare(plan)
        stages.unit(work.residual, self._layers[0].in_floor, work.unit)
        floors = [*(layer.in_floor for layer in self._layers[1:]), self._norm_floor]
        for number, (layer, after) in enumerate(zip(self._layers, floors, strict=True)):
            self._attend(layer, work, plan, ropes[layer.kind], pools[number])
            self._mix(number, layer, work, after)
            if routing is not None:
                routing.expert_LT.append(torch.from_numpy(work.expert.copy()))
                routing.probs_LTE.append(torch.from_numpy(work.probs.copy()))
        return torch.from_numpy(work.unit) * self._norm

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """As the policy's, of hidden states [..., D]."""
        logits = torch.empty(*hidden.shape[:-1], self._vocabulary)
        hidden_RD, logits_RV = hidden.flatten(0, -2).contiguous(), logits.view(-1, self._vocabulary)
        linear.product(hidden_RD.numpy(), self._head_PDW, logits_RV.numpy())
        return logits if self._head_bias is None else logits.add_(self._head_bias)

    def _attend(
        self, layer: PackedLayer, work: _Work, plan: PackedPlan, rope: Angles, pools: list[np.ndarray]
    ) -> None:
        """From the normed residual to the next one, through attention."""
        linear.product(work.unit, layer.projection_PDW, work.projected)
        k_pool, v_pool, x_pool, delayed_pool = pools
        stages.gather(
            work.projected, layer.projection_bias, plan.source_TA, plan.tail_T, layer.before, x_pool, delayed_pool, work.x,
            work.previous,
        )  # fmt: skip
        linear.products(work.x, layer.convolution_NPDW, work.mixed)
        stages.turn(
            work.mixed, work.projected, layer.convolution_bias_NO, layer.temperature_N, *rope, work.previous, plan.write_T,
            k_pool, v_pool, work.line, work.q, work.k, work.v,
        )  # fmt: skip
        out_THD = work.attended.reshape(-1, self._heads, self._size)
        self._attention(plan, layer.kind, work.q, work.k, work.v, k_pool, v_pool, out_THD)
        linear.product(work.attended, layer.output_PDW, work.y)
        stages.add_unit(
            work.y, layer.output_bias, work.residual, layer.attention_residual_D, layer.post_floor, work.unit
        )

    def _mix(self, number: int, layer: PackedLayer, work: _Work, after: np.float32) -> None:
        """From the normed residual to the next one, through router and experts."""
        state, below = work.states[number % 2], work.states[1 - number % 2]
        linear.product(work.unit, layer.router_down_PDW, state)
        stages.route(
            state, layer.router_down_bias, below, layer.router_scale, layer.router_floor, layer.fc1_PDW, layer.fc1_bias,
            layer.fc2_PDW, layer.fc2_bias, layer.router_out, layer.balance_C, work.unit, work.probs, work.expert, work.slot,
            work.begin, work.sorted, *work.hidden,
        )  # fmt: skip
        stages.experts(
            work.sorted, work.begin, layer.gate_up_EPDW, layer.down_EPFW, work.gate_up, work.inner, work.out
        )
        stages.combine(
            work.out, work.slot, work.expert, work.probs, layer.mlp_bias, work.residual, layer.mlp_residual_D, after, work.unit
        )

    def _work_of(self, rows: int) -> _Work:
        work = self._work.get(rows)
        if work is None:
            moved = self._memory.moved
            work = _Work(self._layers[0], self._heads, self._kv_heads, rows, self._memory)
            if moved != self._memory.moved or len(self._work) >= _MOST_SIZES:
                self._work.clear()  # memory that grew lies elsewhere
            self._work[rows] = work
        return work

    def _pools_of(self, state: SequenceState) -> list[list[np.ndarray]]:
        """The arrays of `SequenceState.pools` by layer, made anew only for another cache."""
        first = state.pools(0)
        if self._pools is None or self._pools[0] is not first:
            self._pools = first, [[x.numpy() for x in state.pools(number)] for number in range(len(self._layers))]
        return self._pools[1]

    def _angles(self, kind: str, position_T: torch.Tensor) -> Angles:
        """cos_TO and sin_TO over whole heads, and half the features that turn; the sine has the sign of the rotated half."""
        longest = int(position_T.max()) + 1
        known = self._rope.get(kind)
        if known is None or len(known[0]) < longest:
            most = max(_ANGLES, 2 ** (longest - 1).bit_length())
            lines = torch.arange(most).view(-1, 1, _ANGLES)
            parts = zip(*(self._policy.model.rotary_emb(torch.zeros(1), line, kind) for line in lines), strict=True)
            cos, sin = (torch.cat([part[0] for part in some]) for some in parts)
            half = cos.shape[-1] // 2
            sin = torch.cat([-sin[:, :half], sin[:, half:]], dim=-1)
            known = self._rope[kind] = cos.numpy().copy(), sin.numpy().copy(), half
        position = position_T.numpy()
        return known[0][position], known[1][position], known[2]


def _nothing(work: _Work) -> list[np.ndarray]:
    """Pools for passes without a cache: nothing is read from them or kept in them."""
    return [work.k, work.v, work.projected, work.projected]


def _layers(policy: Policy) -> Iterator[Layer]:
    for layer in policy.model.layers:
        yield cast("Layer", layer)
