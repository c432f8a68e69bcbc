"""The network of `PackedBackend` over one plan, as one function that numba compiles. It holds no lock of the interpreter: several
threads run it side by side, each for other sequences.

Legend: as in `backend`; O features of a head, I slots of rows sorted by expert, W windows, P positions (as a letter of weights:
panels).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ....kernels.compiled import compiled
from ....kernels.lanes import copy_line
from ....kernels.linear.numba import product_of
from ....kernels.verify.numba import draw_chain, reject
from .attention import attend, lines_of
from .between import put_drafts, rows_to_draft_from, rows_to_verify
from .stages import add_unit, combine, experts, gather, route, turn, unit
from .threads import hand_over, in_threads
from .weights import PackedLayer


class Network(NamedTuple):
    """The weights of one version but for the heads: the scaled embedding, the layers, and the last norm, which carries the square
    root of its size."""

    embedded_VD: np.ndarray
    layers: PackedLayer
    norm: np.ndarray
    norm_floor: np.float32


class Angles(NamedTuple):
    """RoPE over whole heads, by window and position, and half the features that turn. The sine has the sign of the rotated
    half."""

    cos_WPO: np.ndarray
    sin_WPO: np.ndarray
    half_W: np.ndarray


class Pools(NamedTuple):
    """`kernels.cca.Pools` of all layers, each with L in front."""

    k: np.ndarray
    v: np.ndarray
    x: np.ndarray
    delayed: np.ndarray


class Work(NamedTuple):
    """The working memory of a pass of T rows; in `expert_LT` and `probs_LTC` the router's choices remain."""

    residual: np.ndarray
    unit: np.ndarray
    projected: np.ndarray
    x: np.ndarray
    mixed: np.ndarray
    attended_THD: np.ndarray
    y: np.ndarray
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    previous: np.ndarray
    states_2TP: np.ndarray
    probs_LTC: np.ndarray
    expert_LT: np.ndarray
    slot: np.ndarray
    sorted: np.ndarray
    gate_up: np.ndarray
    inner: np.ndarray
    out: np.ndarray
    hidden_2TP: np.ndarray
    final_TD: np.ndarray

    @classmethod
    def of(cls, layers: PackedLayer, heads: int, kv_heads: int, rows: int, take: Callable[..., np.ndarray]) -> Work:
        """Args: take, gives float32 memory by name and shape."""
        (count, turns, size), inputs = layers.convolution_bias_NO.shape, layers.convolution_NPDW.shape[3]
        hidden, width, classes = layers.output_bias.shape[1], layers.router_down_bias.shape[1], layers.balance_C.shape[1]
        inner = layers.down_EPFW.shape[3]
        return cls(
            take("residual", rows, hidden), take("unit", rows, hidden),
            take("projected", rows, layers.projection_bias.shape[1]), take("x", turns, rows, inputs),
            take("mixed", turns, rows, size), take("attended", rows, heads, size), take("y", rows, hidden),
            take("q", rows, heads, size), take("k", rows, kv_heads, size), take("v", rows, kv_heads, size),
            take("previous", rows, kv_heads * size // 2), take("states", 2, rows, width), take("probs", count, rows, classes),
            np.zeros((count, rows), np.int64), np.zeros(rows, np.int64), take("sorted", rows, hidden),
            take("gate_up", rows, 2 * inner), take("inner", rows, inner), take("out", rows, hidden),
            take("hidden", 2, rows, width), take("final", rows, hidden),
        )  # fmt: skip


@compiled(nogil=True)
def _run_part(part, sequence_P1, plan, network, angles, pools, work, lines_P, hidden_TD):
    """The rows of some sequences. Parts may run at the same time."""
    begin_s, end_s, lines = sequence_P1[part], sequence_P1[part + 1], lines_of(lines_P, part)
    begin, end, features, w = plan.first_S1[begin_s], plan.first_S1[end_s], hidden_TD.shape[1], network.layers
    flat_TD = work.attended_THD.reshape(work.attended_THD.shape[0], -1)
    begin_C = np.empty(w.balance_C.shape[1] + 1, np.int64)
    for t in range(begin, end):
        copy_line(network.embedded_VD, plan.token_T[t] * features, work.residual, t * features, features)
    unit(begin, end, work.residual, w.in_floor[0], work.unit)
    for n in range(len(w.window)):
        window, k_pool, v_pool = w.window[n], pools.k[n], pools.v[n]
        product_of(work.unit, begin, end, w.projection_PDW[n], work.projected)
        gather(
            begin, end, work.projected, w.projection_bias[n], plan.source_TA, plan.tail_T, w.before[n], pools.x[n],
            pools.delayed[n], work.x, work.previous,
        )  # fmt: skip
        for h in range(work.x.shape[0]):
            product_of(work.x[h], begin, end, w.convolution_NPDW[n, h], work.mixed[h])
        turn(
            begin, end, work.mixed, work.projected, w.convolution_bias_NO[n], w.temperature_N[n], plan.position_T,
            angles.cos_WPO[window], angles.sin_WPO[window], angles.half_W[window], work.previous, plan.write_T, k_pool, v_pool,
            work.q, work.k, work.v,
        )  # fmt: skip
        attend(begin_s, end_s, plan, window, work.q, work.k, work.v, k_pool, v_pool, lines, work.attended_THD)
        product_of(flat_TD, begin, end, w.output_PDW[n], work.y)
        add_unit(begin, end, work.y, w.output_bias[n], work.residual, w.attention_residual_D[n], w.post_floor[n], work.unit)
        state_TP, below_TP = work.states_2TP[n % 2], work.states_2TP[1 - n % 2]
        product_of(work.unit, begin, end, w.router_down_PDW[n], state_TP)
        route(
            begin, end, state_TP, w.router_down_bias[n], below_TP, w.router_scale[n, : w.states[n]], w.router_floor[n],
            w.fc1_PDW[n], w.fc1_bias[n], w.fc2_PDW[n], w.fc2_bias[n], w.router_out_PDW[n], w.balance_C[n], work.unit,
            work.probs_LTC[n], work.expert_LT[n], work.slot, begin_C, work.sorted, work.hidden_2TP[0], work.hidden_2TP[1],
        )  # fmt: skip
        experts(work.sorted, begin_C, w.gate_up_EPDW[n], w.down_EPFW[n], work.gate_up, work.inner, work.out)
        after = w.in_floor[n + 1] if n + 1 < len(w.window) else network.norm_floor
        combine(
            begin, end, work.out, work.slot, work.expert_LT[n], work.probs_LTC[n], w.mlp_bias[n], work.residual,
            w.mlp_residual_D[n], after, work.unit,
        )  # fmt: skip
    for t in range(begin, end):
        for d in range(features):
            hidden_TD[t, d] = work.unit[t, d] * network.norm[d]


@compiled(nogil=True)
def _head_part(part, parts, hidden_RD, weight_PDW, logits_RV):
    """The logits of some rows."""
    rows = hidden_RD.shape[0]
    product_of(hidden_RD, rows * part // parts, rows * (part + 1) // parts, weight_PDW, logits_RV)


@compiled(nogil=True)
def head(desk, parts, hidden_RD, weight_PDW, logits_RV):
    """Writes the logits of rows of hidden states, about as many of them in each part. Returns how many parts failed."""
    hand_over(_head_part, (parts, hidden_RD, weight_PDW, logits_RV), desk)
    return in_threads(desk, parts)


@compiled()
def parts_of(first_S1, begin, end, count):
    """First sequence of each of at most `count` parts with about as many rows each of the sequences begin..end, and `end`. A
    sequence belongs to the part in which its middle lies."""
    first_P1, parts, last, rows = np.empty(count + 1, np.int64), 0, 0, first_S1[end] - first_S1[begin]
    first_P1[0] = begin
    for s in range(begin, end):
        middle = (first_S1[s] + first_S1[s + 1]) / 2 - first_S1[begin]
        part = min(int(middle * count / rows), count - 1)
        if s > begin and part > last:
            parts += 1
            first_P1[parts] = s
        last = part
    first_P1[parts + 1] = end
    return first_P1[: parts + 2]


@compiled(nogil=True)
def run(desk, most_P, plan, network, angles, pools, work, lines, hidden_TD, head_PDW, between):
    """Writes the rows of a plan into hidden_TD, the final hidden states; the clean ones are kept in the pools. Returns how many
    parts failed.

    Args:
        desk: of `Threads`. most_P: most parts of the first pass and of the second, each of which a thread runs. lines: of each
            part.
        between: with what the sequences of a second pass run.
    """
    sequences, draws, verifies = len(plan.start_S), between.draws, between.verifies
    first_P1 = parts_of(plan.first_S1, 0, between.sequences if draws.sequences else sequences, most_P[0])
    hand_over(_run_part, (first_P1, plan, network, angles, pools, work, lines, hidden_TD), desk)
    failed = in_threads(desk, len(first_P1) - 1)
    if draws.sequences == 0 or failed:
        return failed
    hidden_ND, logits_NV = rows_to_draft_from(between, hidden_TD)
    failed = head(desk, len(first_P1) - 1, hidden_ND, head_PDW, logits_NV)
    draw_chain(draws)
    put_drafts(between, plan.first_S1, plan.token_T)
    second_P1 = parts_of(plan.first_S1, between.sequences, sequences, most_P[1])
    hand_over(_run_part, (second_P1, plan, network, angles, pools, work, lines, hidden_TD), desk)
    failed += in_threads(desk, len(second_P1) - 1)
    hidden_ND, logits_NV = rows_to_verify(between, hidden_TD, plan.first_S1)
    failed += head(desk, len(second_P1) - 1, hidden_ND, head_PDW, logits_NV)
    if verifies.sequences > 0:
        reject(verifies)
    return failed
