"""The network of `Policy.forward` with its weights folded for decoding on a CPU, where a small step is paid by the operation.

Folded once, from the policy's own parameters: norms' weights and sizes into the matrices after them, the two convolutions
into one over all ancestors, the means of queries and keys into the projection, residual scales and biases into the matrices
before them. Few rows go through all experts at once, as one pair of products, which is cheaper than to sort them.

Invariants:
- Same results as `Policy.forward` over the same layout and cache, up to rounding; `tests/model/test_packed.py` compares.
- What a clean row gives depends on its prefix alone, to the last bit: the log-probabilities of a sample are those of one
  causal pass over its tokens. For this no product has a single row (`packed_plan`), and an expert's rows are never one.
- The weights are copies: after the policy's change, make a new one.

Legend: as in `cca` and `experts`; N = H + G heads, A ancestors, F inner size of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import addmm, mm

from ..kernels.attention import attend
from ..kernels.dispatch import takes_triton
from .cca import Projection
from .layout import TokenLayout
from .packed_plan import PackedPlan
from .policy import Layer, Policy, Routing
from .state import SequenceState

MOST_PARAMETERS = 2**26
"""A larger policy is not paid by the operation, and its copy would weigh."""
_MOST_PAIRS = 2**22
"""With fewer pairs of tokens, the Markov head is kept as their table."""
_ALL_EXPERTS_ROWS = 8
_LEAST_LENGTH = torch.finfo(torch.float32).eps

Angles = tuple[torch.Tensor, torch.Tensor, int]


@dataclass
class _Layer:
    """One layer, folded. Matrices are [in, out] and contiguous: products of few rows with them take half the time that those
    with their transposes do."""

    kind: str
    in_floor: torch.Tensor
    projection: torch.Tensor  # q and k, delayed value, current value, then q and k with their means
    projection_bias: torch.Tensor | None
    before_W: torch.Tensor  # delayed value before the document
    convolution_N_AE_O: torch.Tensor
    convolution_bias_N1O: torch.Tensor
    temperature_N1: torch.Tensor
    output: torch.Tensor
    output_bias: torch.Tensor
    attention_residual_D: torch.Tensor
    post_floor: torch.Tensor
    router_down: torch.Tensor
    router_down_bias: torch.Tensor
    router_scale: torch.Tensor | None
    router_floor: torch.Tensor
    fc1: torch.Tensor
    fc1_bias: torch.Tensor
    fc2: torch.Tensor
    fc2_bias: torch.Tensor
    router_out: torch.Tensor
    balance_C: torch.Tensor
    gate_up_ED2F: torch.Tensor
    gate_up_all: torch.Tensor  # [D, E * 2F]
    down_EFD: torch.Tensor
    mlp_bias: torch.Tensor
    mlp_residual_D: torch.Tensor


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
            self._layers = [_fold(layer) for layer in _layers(policy)]
            size = config.hidden_size
            self._norm, self._norm_floor = trunk.norm.weight * size**0.5, _floor(size, trunk.norm.eps)
            self._head_DV, self._head_bias = _turned(policy.lm_head.weight), policy.lm_head.bias
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
        return logits_RV[:count].unflatten(0, hidden.shape[:-1])

    def markov(self, previous: torch.Tensor) -> torch.Tensor:
        """As the policy's Markov head, which it must have; looked up where the vocabulary is small."""
        if self._markov_VV is not None:
            return F.embedding(previous, self._markov_VV)
        assert self._policy.markov is not None
        return self._policy.markov(previous)

    def _attend(
        self, number: int, layer: _Layer, residual_TD: torch.Tensor, plan: PackedPlan, rope: Angles,
        state: SequenceState | None,
    ) -> torch.Tensor:  # fmt: skip
        """Attention's output, scaled and with all biases, to which the scaled residual is added."""
        size, heads, kv_heads = self._size, self._heads, self._kv_heads
        channels, width = (heads + kv_heads) * size, kv_heads * size // 2
        normed_TD = _unit(residual_TD, layer.in_floor)
        projected = _affine(normed_TD, layer.projection, layer.projection_bias)
        x_TC, delayed_TW, current_TW, means_TC = projected.split([channels, width, width, channels], dim=-1)
        x_TAC, previous_TW = self._ancestors(number, layer, x_TC, delayed_TW, plan, state)
        x_NTE = x_TAC.view(len(x_TC), -1, heads + kv_heads, size).permute(2, 0, 1, 3)
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
        self, number: int, layer: _Layer, x_TC: torch.Tensor, delayed_TW: torch.Tensor, plan: PackedPlan,
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
        self, layer: _Layer, residual_TD: torch.Tensor, router_TP: torch.Tensor | None, routing: Routing | None
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
        few = len(normed_TD) <= _ALL_EXPERTS_ROWS
        expert_TD = (_by_all if few else _by_expert)(layer, normed_TD, expert_T1[:, 0])
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
    return x.index_select(0, index.flatten()).unflatten(0, index.shape)


def _by_all(layer: _Layer, x_TD: torch.Tensor, expert_T: torch.Tensor) -> torch.Tensor:
    """Few rows through every expert, of which each keeps its own; 0 for the skip expert."""
    rows, (experts, _, width) = len(x_TD), layer.gate_up_ED2F.shape
    gate_ETF, up_ETF = mm(x_TD, layer.gate_up_all).view(rows, experts, width).transpose(0, 1).chunk(2, dim=-1)
    out_ETD = torch.bmm(F.silu(gate_ETF) * up_ETF, layer.down_EFD)
    own_TD = out_ETD.flatten(0, 1).index_select(0, expert_T.clamp(max=experts - 1) * rows + torch.arange(rows))
    return own_TD * (expert_T < experts)[:, None]


def _by_expert(layer: _Layer, x_TD: torch.Tensor, expert_T: torch.Tensor) -> torch.Tensor:
    """Each row through its expert; 0 for the skip expert. Rows are sorted on the host, so that all but the products is done
    for all experts at once. A row that its expert has to itself is computed twice, as no product may have one row."""
    expert = expert_T.numpy()
    counts = np.bincount(expert, minlength=len(layer.down_EFD) + 1)
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
    gate, up = inner.chunk(2, dim=-1)
    inner = F.silu(gate).mul_(up)
    out = x_TD.new_zeros(ends[-1], x_TD.shape[1])
    for e, begin, end in spans:
        mm(inner[begin:end], layer.down_EFD[e], out=out[begin:end])
    return out.index_select(0, torch.from_numpy(place))


def _affine(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return mm(x, matrix) if bias is None else addmm(bias, x, matrix)


def _turned(matrix: torch.Tensor) -> torch.Tensor:
    """[..., out, in] as [..., in, out], contiguous."""
    return matrix.mT.contiguous()


def _floor(size: int, eps: float) -> torch.Tensor:
    return torch.tensor((size * eps) ** 0.5)


def _unit(x: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """x / sqrt(sum x^2 + floor^2): RMS norm but for its weight and the square root of its size, in three operations."""
    return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor)


def _rotate(x_TNO: torch.Tensor, angles: Angles) -> torch.Tensor:
    cos_T1O, sin_T1O, half = angles
    left, right, kept = x_TNO.split([half, half, x_TNO.shape[-1] - 2 * half], dim=-1)
    return torch.addcmul(x_TNO * cos_T1O, torch.cat([right, left, kept], dim=-1), sin_T1O)


def _layers(policy: Policy) -> Iterator[Layer]:
    for layer in policy.model.layers:
        assert isinstance(layer, Layer)
        yield layer


def _fold(layer: Layer) -> _Layer:
    attention, router, experts = layer.self_attn, layer.mlp.gate, layer.mlp.experts
    mlp = router.router_mlp
    weight, bias = _projection(layer)
    convolution, convolution_bias = _convolution(attention.qkv_proj)
    turn_hidden, hidden_bias, turn_residual, residual_bias = layer.post_attention_residual_scale.scales
    mlp_hidden, mlp_bias, mlp_residual, mlp_residual_bias = layer.post_mlp_residual_scale.scales
    own_bias = attention.o_proj.bias
    hidden, width = layer.input_layernorm.weight.numel(), mlp.norm.weight.numel()
    norm = layer.post_attention_layernorm.weight * hidden**0.5
    delayed = attention.qkv_proj.v_proj_delayed
    gate_up = experts.gate_up_proj * norm
    query_heads, size = attention.qkv_proj.heads, attention.qkv_proj.head_dim
    return _Layer(
        kind=attention.kind,
        in_floor=_floor(hidden, layer.input_layernorm.eps),
        projection=_turned(weight * layer.input_layernorm.weight * hidden**0.5),
        projection_bias=bias,
        before_W=weight.new_zeros(1, len(delayed.weight)) if delayed.bias is None else delayed.bias[None].clone(),
        convolution_N_AE_O=convolution,
        convolution_bias_N1O=convolution_bias,
        temperature_N1=torch.cat([weight.new_ones(query_heads), attention.qk_norm.temp])[:, None] * size**0.5,
        output=_turned(attention.o_proj.weight * turn_hidden[:, None]),
        output_bias=(hidden_bias if own_bias is None else hidden_bias + own_bias) * turn_hidden
        + residual_bias * turn_residual,
        attention_residual_D=turn_residual.clone(),
        post_floor=_floor(hidden, layer.post_attention_layernorm.eps),
        router_down=_turned(router.down_proj.weight * norm),
        router_down_bias=router.down_proj.bias.clone(),
        router_scale=None if router.router_states_scale is None else router.router_states_scale.clone(),
        router_floor=_floor(width, mlp.norm.eps),
        fc1=_turned(mlp.fc1.weight * mlp.norm.weight * width**0.5),
        fc1_bias=mlp.fc1.bias.clone(),
        fc2=_turned(mlp.fc2.weight),
        fc2_bias=mlp.fc2.bias.clone(),
        router_out=_turned(mlp.out_proj.weight),
        balance_C=router.balancing_biases.clone(),
        gate_up_ED2F=_turned(gate_up),
        gate_up_all=_turned(gate_up.flatten(0, 1)),
        down_EFD=_turned(experts.down_proj * mlp_hidden[:, None]),
        mlp_bias=mlp_bias * mlp_hidden + mlp_residual_bias * mlp_residual,
        mlp_residual_D=mlp_residual.clone(),
    )


def _projection(layer: Layer) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows: q and k, delayed value, current value, and half of q + k and of k + mean q, as CCA adds them."""
    project = layer.self_attn.qkv_proj
    groups, size = project.kv_heads, project.head_dim

    def whole(q: torch.Tensor, k: torch.Tensor, delayed: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
        q_GUO, k_G1O = q.unflatten(0, (groups, -1, size)), k.unflatten(0, (groups, 1, size))
        means = (q_GUO + k_G1O).flatten(0, 2) / 2, (k_G1O[:, 0] + q_GUO.mean(1)).flatten(0, 1) / 2
        return torch.cat([q, k, delayed, current, *means])

    layers = project.q_proj, project.k_proj, project.v_proj_delayed, project.v_proj_current
    biases = [each.bias for each in layers if each.bias is not None]
    return whole(*(each.weight for each in layers)), whole(*biases) if biases else None


def _convolution(project: Projection) -> tuple[torch.Tensor, torch.Tensor]:
    """Both convolutions as one product per head over all ancestors, and its bias."""
    depthwise, grouped = project.conv_qk_depthwise, project.conv_qk_grouped
    assert depthwise.bias is not None and grouped.bias is not None
    heads, size = project.heads + project.kv_heads, project.head_dim
    w_NOEH = grouped.weight.flip(-1).unflatten(0, (heads, size))
    taps_NEJ = depthwise.weight[:, 0].flip(-1).unflatten(0, (heads, size))
    time0, time1 = taps_NEJ.shape[-1], w_NOEH.shape[-1]
    whole_NAEO = w_NOEH.new_zeros(heads, time0 + time1 - 1, size, size)
    for h in range(time1):
        for j in range(time0):
            whole_NAEO[:, h + j] += (w_NOEH[..., h] * taps_NEJ[:, None, :, j]).transpose(1, 2)
    bias_NO = grouped.bias.unflatten(0, (heads, size)) + torch.einsum(
        "noeh,ne->no", w_NOEH, depthwise.bias.unflatten(0, (heads, size))
    )
    return whole_NAEO.flatten(1, 2), bias_NO[:, None]
