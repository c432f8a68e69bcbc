"""The network of `Policy.forward` with its weights folded for decoding on a CPU, where a small step is paid by the operation.

Invariants:
- Same results as `Policy.forward` over the same layout and cache, up to rounding; `tests/model/test_packed.py` compares.
- What a clean row gives depends on its prefix alone, to the last bit: the log-probabilities of a sample are those of one
  causal pass over its tokens. For this no product has a single row (`plan`), and an expert's rows are never one.
- The weights are copies: after the policy's change, make a new one.

Legend: as in `cca` and `experts`; N = H + G heads, A ancestors, F inner size of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import addmm, mm, split_with_sizes

from ...kernels.attention import attend
from ...kernels.dispatch import takes_triton
from ..layout import TokenLayout
from ..policy import Layer, Policy, Routing
from ..state import SequenceState
from .plan import PackedPlan
from .weights import PackedLayer, floor, fold_layer, turned

MOST_PARAMETERS = 2**26
"""A larger policy is not paid by the operation, and its copy would weigh."""
_MOST_PAIRS = 2**22
"""With fewer pairs of tokens, the Markov head is kept as their table."""
_LEAST_LENGTH = torch.finfo(torch.float32).eps

Angles = tuple[torch.Tensor, torch.Tensor, int]


class PackedForward:
    """Callable as `Policy.forward` is, and with its heads."""

    def __init__(self, policy: Policy) -> None:
        with torch.inference_mode():
            config, trunk = policy.config, policy.model
            self._policy = policy
            self._heads, self._kv_heads, self._size = (
                config.num_attention_heads, config.num_key_value_heads, config.head_dim,
            )  # fmt: skip
            self._scale = self._size**-0.5
            self._embedded_VD = (
                trunk.embed_tokens.weight + trunk.input_hidden_states_bias
            ) * trunk.input_hidden_states_scale
            self._layers = [fold_layer(layer) for layer in _layers(policy)]
            size = config.hidden_size
            self._norm, self._norm_floor = trunk.norm.weight * size**0.5, floor(size, trunk.norm.eps)
            self._head_DV, self._head_bias = turned(policy.lm_head.weight), policy.lm_head.bias
            self._rope: dict[str, Angles] = {}
            self._markov_VV: torch.Tensor | None = None
            if policy.markov is not None and config.vocab_size**2 <= _MOST_PAIRS:
                self._markov_VV = policy.markov(torch.arange(config.vocab_size))

    @staticmethod
    def serves(policy: Policy) -> bool:
        """Whether this policy decodes so."""
        return (
            policy.device.type == "cpu"
            and not takes_triton(policy.model.embed_tokens.weight)
            and policy.dtype == torch.float32
            and policy.config.hidden_act == "silu"
            and sum(parameter.numel() for parameter in policy.parameters()) <= MOST_PARAMETERS
        )

    def __call__(
        self, layout: TokenLayout, state: SequenceState | None = None, routing: Routing | None = None
    ) -> torch.Tensor:
        """Final hidden states, hidden_TD, of every row. Without a cache, of clean rows from the start of their documents."""
        plan = PackedPlan.of(layout, self._policy.hops, self._policy.windows, self._size)
        token_T, position_T = (x.expand(2) if plan.twice else x for x in (layout.token_T, layout.position_T))
        residual_TD = self._embedded_VD.index_select(0, token_T)
        ropes = {kind: self._angles(kind, position_T) for kind in self._policy.windows}
        router_TP: torch.Tensor | None = None
        for number, layer in enumerate(self._layers):
            attended = self._attend(number, layer, residual_TD, plan, ropes[layer.kind], state)
            residual_TD = torch.addcmul(attended, residual_TD, layer.attention_residual_D)
            residual_TD, router_TP = self._mix(layer, residual_TD, router_TP, routing)
        if plan.twice and routing is not None:
            routing.expert_LT[:] = [expert_T[:1] for expert_T in routing.expert_LT]
            routing.probs_LTE[:] = [probs_TE[:1] for probs_TE in routing.probs_LTE]
        return (_unit(residual_TD, self._norm_floor) * self._norm)[: layout.rows]

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """As the policy's, of hidden states [..., D]."""
        hidden_RD = hidden.flatten(0, -2)
        count = len(hidden_RD)
        logits_RV = _affine(hidden_RD.expand(2, -1) if count == 1 else hidden_RD, self._head_DV, self._head_bias)
        return logits_RV[:count].view(*hidden.shape[:-1], -1)

    def markov(self, previous: torch.Tensor) -> torch.Tensor:
        """As the policy's Markov head, which it must have; looked up where the vocabulary is small."""
        if self._markov_VV is not None:
            return F.embedding(previous, self._markov_VV)
        assert self._policy.markov is not None
        return self._policy.markov(previous)

    def _attend(
        self, number: int, layer: PackedLayer, residual_TD: torch.Tensor, plan: PackedPlan, rope: Angles,
        state: SequenceState | None,
    ) -> torch.Tensor:  # fmt: skip
        """Attention's output, scaled and with all biases, to which the scaled residual is added."""
        size, heads, kv_heads = self._size, self._heads, self._kv_heads
        channels, width = (heads + kv_heads) * size, kv_heads * size // 2
        normed_TD = _unit(residual_TD, layer.in_floor)
        projected = _affine(normed_TD, layer.projection, layer.projection_bias)
        x_TC, delayed_TW, current_TW, means_TC = split_with_sizes(projected, [channels, width, width, channels], -1)
        x_TAC, previous_TW = self._ancestors(number, layer, x_TC, delayed_TW, plan, state)
        x_NTE = x_TAC.view(x_TC.shape[0], -1, heads + kv_heads, size).permute(2, 0, 1, 3)
        mixed_NTO = torch.baddbmm(layer.convolution_bias_N1O, x_NTE.flatten(2), layer.convolution_N_AE_O)
        qk_TNO = mixed_NTO.transpose(0, 1) + means_TC.view(-1, heads + kv_heads, size)
        length_TN1 = torch.linalg.vector_norm(qk_TNO, dim=-1, keepdim=True).clamp_(min=_LEAST_LENGTH)
        qk_TNO = _rotate(qk_TNO * (layer.temperature_N1 / length_TN1), rope)
        q_THD, k_TGD = qk_TNO[:, :heads], qk_TNO[:, heads:]
        v_TGD = torch.cat([current_TW, previous_TW], dim=-1).view(-1, kv_heads, size)

        if state is None:
            keys, values = _at(k_TGD, plan.clean_SP), _at(v_TGD, plan.clean_SP)
        else:
            state.write(number, k_TGD, v_TGD, x_TC, delayed_TW)
            keys, values = state.read(number, plan.positions)
        if plan.mask_SM is not None:
            keys = torch.cat([keys, _at(k_TGD, plan.mask_SM)], dim=1)
            values = torch.cat([values, _at(v_TGD, plan.mask_SM)], dim=1)
        out_SRHD = attend(_at(q_THD, plan.query_SR), keys, values, plan.bias[layer.kind], self._scale)
        out_TC = out_SRHD.flatten(2).flatten(0, 1).index_select(0, plan.place_T)
        return addmm(layer.output_bias, out_TC, layer.output)

    def _ancestors(
        self, number: int, layer: PackedLayer, x_TC: torch.Tensor, delayed_TW: torch.Tensor, plan: PackedPlan,
        state: SequenceState | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """x_TAC of each row and its ancestors, and the parent's delayed value."""
        hops = self._policy.hops
        if state is None:
            tail_SHC, tail_SW = x_TC.new_zeros(plan.sequences, hops, x_TC.shape[1]), layer.before_W.expand(plan.sequences, -1)
        else:
            tail_SHC, tail_SW = state.read_tail(number)
        if plan.ancestor_TA is None:
            if plan.twice:
                tail_SHC, tail_SW = tail_SHC.expand(2, -1, -1), tail_SW.expand(2, -1)
            return torch.cat([x_TC[:, None], tail_SHC], dim=1), tail_SW
        x_NC = torch.cat([x_TC.new_zeros(1, x_TC.shape[1]), tail_SHC.flatten(0, 1), x_TC])
        before_NW = torch.cat([layer.before_W, tail_SW.repeat_interleave(hops, dim=0), delayed_TW])
        x_TAC = _at(x_NC, plan.ancestor_TA)
        return x_TAC, before_NW.index_select(0, plan.ancestor_TA[:, 1])

    def _mix(
        self, layer: PackedLayer, residual_TD: torch.Tensor, router_TP: torch.Tensor | None, routing: Routing | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Router and experts: the next residual and router state."""
        normed_TD = _unit(residual_TD, layer.post_floor)
        state_TP = addmm(layer.router_down_bias, normed_TD, layer.router_down)
        if router_TP is not None and layer.router_scale is not None:
            state_TP = torch.addcmul(state_TP, router_TP, layer.router_scale)
        hidden = _unit(state_TP, layer.router_floor)
        hidden = F.gelu(addmm(layer.fc1_bias, hidden, layer.fc1))
        hidden = F.gelu(addmm(layer.fc2_bias, hidden, layer.fc2))
        probs_TC = mm(hidden, layer.router_out).softmax(dim=-1)
        expert_T1 = (probs_TC + layer.balance_C).argmax(dim=-1, keepdim=True)
        weight_T1 = probs_TC.gather(1, expert_T1)
        if routing is not None:
            routing.expert_LT.append(expert_T1[:, 0])
            routing.probs_LTE.append(probs_TC)
        expert_TD = _by_expert(layer, normed_TD, expert_T1[:, 0])
        mixed_TD = torch.addcmul(layer.mlp_bias, expert_TD, weight_T1)
        return torch.addcmul(mixed_TD, residual_TD, layer.mlp_residual_D), state_TP

    def _angles(self, kind: str, position_T: torch.Tensor) -> Angles:
        """cos_T1D and sin_T1D over whole heads, and half the features that turn: 1 and 0 where nothing turns, and the sign
        of the rotated half in the sine."""
        longest = int(position_T.max()) + 1
        known = self._rope.get(kind)
        if known is None or len(known[0]) < longest:
            line = torch.arange(2 ** (longest - 1).bit_length())[None]
            cos, sin = (x[0] for x in self._policy.model.rotary_emb(torch.zeros(1), line, kind))
            rest, half = self._size - cos.shape[-1], cos.shape[-1] // 2
            known = self._rope[kind] = (
                F.pad(cos, (0, rest), value=1.0)[:, None],
                F.pad(torch.cat([-sin[:, :half], sin[:, half:]], dim=-1), (0, rest))[:, None],
                half,
            )
        return known[0].index_select(0, position_T), known[1].index_select(0, position_T), known[2]


def _at(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x's entries at an index of any shape."""
    return x.index_select(0, index.reshape(-1)).view(*index.shape, *x.shape[1:])


def _by_expert(layer: PackedLayer, x_TD: torch.Tensor, expert_T: torch.Tensor) -> torch.Tensor:
    """Each row through its expert; 0 for the skip expert. Rows are sorted on the host, so that all but the products is done
    for all experts at once. A row that its expert has to itself is computed twice, as no product may have one row."""
    expert = expert_T.numpy()
    counts = np.bincount(expert, minlength=layer.down_EFD.shape[0] + 1)
    times = np.where(counts == 1, 2, 1)
    order = np.argsort(expert, kind="stable")
    repeats = times[expert[order]]
    place = np.empty_like(order)
    place[order] = repeats.cumsum() - repeats
    ends = (counts * times).cumsum().tolist()
    spans = [(e, begin, end) for e, (begin, end) in enumerate(zip([0, *ends[:-2]], ends[:-1], strict=True)) if end > begin]
    routed = ends[-2]
    sorted_TD = x_TD.index_select(0, torch.from_numpy(order.repeat(repeats)[:routed]))
    inner = x_TD.new_empty(routed, layer.gate_up_ED2F.shape[2])
    for e, begin, end in spans:
        mm(sorted_TD[begin:end], layer.gate_up_ED2F[e], out=inner[begin:end])
    gate, up = split_with_sizes(inner, [inner.shape[1] // 2] * 2, -1)
    inner = F.silu(gate).mul_(up)
    out = x_TD.new_zeros(ends[-1], x_TD.shape[1])
    for e, begin, end in spans:
        mm(inner[begin:end], layer.down_EFD[e], out=out[begin:end])
    return out.index_select(0, torch.from_numpy(place))


def _affine(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return mm(x, matrix) if bias is None else addmm(bias, x, matrix)


def _unit(x: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """x / sqrt(sum x^2 + floor^2): RMS norm but for its weight and the square root of its size, in three operations."""
    return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor)


def _rotate(x_TNO: torch.Tensor, angles: Angles) -> torch.Tensor:
    cos_T1O, sin_T1O, half = angles
    left, right, kept = split_with_sizes(x_TNO, [half, half, x_TNO.shape[-1] - 2 * half], -1)
    return torch.addcmul(x_TNO * cos_T1O, torch.cat([right, left, kept], dim=-1), sin_T1O)


def _layers(policy: Policy) -> Iterator[Layer]:
    for layer in policy.model.layers:
        assert isinstance(layer, Layer)
        yield layer
