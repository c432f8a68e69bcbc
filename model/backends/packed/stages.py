"""Stages: the functions that `PackedBackend` runs between its matrix products, and the experts with their products. numba
compiles them, so that a layer is a few calls and not tens of operations.

Invariants:
- Rows share nothing. The order of a row's sums depends on its own prefix alone.
- Arrays are float32 and contiguous, given by the caller; nothing is allocated for a row.

Legend: as in `backend`; I slots of rows sorted by expert.
"""

from __future__ import annotations

import numpy as np

from ....kernels.cca.numba import turn_head
from ....kernels.compiled import compiled
from ....kernels.experts.numba import gelu_line, normed_state, silu_line
from ....kernels.lanes import copy_line
from ....kernels.linear.numba import plain_product_of, product_of
from ....kernels.lines import copy_apart, squares

_F = np.float32
_LEAST_NORM = _F(1.1920929e-07)


@compiled()
def unit(begin, end, residual_TD, floor, unit_TD):
    """x / sqrt(sum x^2 + floor): RMS norm but for its weight and the square root of its size."""
    for t in range(begin, end):
        r = _F(1.0) / np.sqrt(squares(residual_TD, t * residual_TD.shape[1], residual_TD.shape[1]) + floor)
        for d in range(residual_TD.shape[1]):
            unit_TD[t, d] = residual_TD[t, d] * r


@compiled()
def gather(begin, end, projected, bias, source_TA, tail_T, before_W, x_pool, delayed_pool, x_NTE, previous_TW):
    """Adds the projection's bias; x of each row's ancestors, side by side by head, and the parent's delayed value. Then keeps
    rows in the tail: whoever reads an entry has read it by then."""
    ancestors, rows = source_TA.shape[1], x_NTE.shape[1]
    heads, width = x_NTE.shape[0], previous_TW.shape[1]
    size = x_NTE.shape[2] // ancestors
    channels = heads * size
    for t in range(begin, end):
        for c in range(projected.shape[1]):
            projected[t, c] += bias[c]
    every, apart = projected.shape[1], rows * ancestors * size
    for t in range(begin, end):
        for a in range(ancestors):
            s, to = source_TA[t, a], (t * ancestors + a) * size
            if s >= 0:
                copy_apart(projected, s * every, x_NTE, to, heads, size, apart)
            elif s < -1:
                copy_apart(x_pool, (-2 - s) * x_pool.shape[1], x_NTE, to, heads, size, apart)
            else:
                x_NTE[:, t, a * size : (a + 1) * size] = 0
        s = source_TA[t, 1]
        if s >= 0:
            copy_line(projected, s * every + channels, previous_TW, t * width, width)
        elif s < -1:
            copy_line(delayed_pool, (-2 - s) * delayed_pool.shape[1], previous_TW, t * width, width)
        else:
            copy_line(before_W, 0, previous_TW, t * width, width)
    for t in range(begin, end):
        if tail_T[t] >= 0:
            copy_line(projected, t * every, x_pool, tail_T[t] * x_pool.shape[1], channels)
            copy_line(projected, t * every + channels, delayed_pool, tail_T[t] * delayed_pool.shape[1], width)


@compiled()
def turn(begin, end, mixed_NTO, projected, bias_NO, temperature_N, position_T, cos_PO, sin_PO, half, previous_TW, write_T,
         k_pool, v_pool, q_THD, k_TGD, v_TGD):  # fmt: skip
    """Means, norm, temperature and RoPE of queries and keys; values; keys and values of clean rows into the cache."""
    rows, heads, size = q_THD.shape
    kv_heads, width = k_TGD.shape[1], previous_TW.shape[1]
    group = heads // kv_heads
    current = (heads + kv_heads) * size + width
    kept, every = kv_heads * size, projected.shape[1]
    for t in range(begin, end):
        for n in range(heads + kv_heads):
            at, own, p = (n * rows + t) * size, t * every + n * size, position_T[t] * cos_PO.shape[1]
            if n < heads:
                to_TD, to, count, other = q_THD, (t * heads + n) * size, 1, heads + n // group
            else:
                to_TD, to, count, other = k_TGD, (t * kv_heads + n - heads) * size, group, (n - heads) * group
            others, share = t * every + other * size, _F(0.5) / _F(count)
            turn_head(
                mixed_NTO, at, bias_NO, n * size, projected, own, projected, others, count, share, temperature_N[n], _LEAST_NORM,
                cos_PO, p, sin_PO, p, half, to_TD, to, size,
            )  # fmt: skip
        copy_line(projected, t * every + current, v_TGD, t * kept, width)
        copy_line(previous_TW, t * width, v_TGD, t * kept + width, width)
        if write_T[t] >= 0:
            copy_line(k_TGD, t * kept, k_pool, write_T[t] * kept, kept)
            copy_line(v_TGD, t * kept, v_pool, write_T[t] * kept, kept)


@compiled()
def add_unit(begin, end, y_TD, bias_D, residual_TD, scale_D, floor, unit_TD):
    """residual = y + bias + residual * scale, in place, and its `unit`."""
    for t in range(begin, end):
        for d in range(residual_TD.shape[1]):
            residual_TD[t, d] = y_TD[t, d] + bias_D[d] + residual_TD[t, d] * scale_D[d]
        r = _F(1.0) / np.sqrt(squares(residual_TD, t * residual_TD.shape[1], residual_TD.shape[1]) + floor)
        for d in range(residual_TD.shape[1]):
            unit_TD[t, d] = residual_TD[t, d] * r


@compiled()
def route(begin, end, state_TP, bias_P, below_TP, scale_P, floor, fc1, fc1_bias_P, fc2, fc2_bias_P, out_PDW, balance_C, unit_TD,
          probs_TC, expert_T, slot_T, begin_C, sorted_ID, a_TP, b_TP):  # fmt: skip
    """The router after its down projection, and rows sorted by expert. `scale_P` is empty where no state is taken.

    `begin_C[c]`: first slot of class c, and the slots in use at the end. `slot_T`: where each row went, -1 for the skip
    expert."""
    width = state_TP.shape[1]
    classes = balance_C.shape[0]
    for t in range(begin, end):
        at = t * width
        normed_state(state_TP, at, bias_P, 0, below_TP, at, scale_P, 0, scale_P.shape[0], floor, a_TP, at, width)
    for weight, bias in ((fc1, fc1_bias_P), (fc2, fc2_bias_P)):
        product_of(a_TP, begin, end, weight, b_TP)
        for t in range(begin, end):
            gelu_line(b_TP, t * width, bias, 0, a_TP, t * width, width)
    plain_product_of(a_TP, begin, end, out_PDW, probs_TC)
    begin_C[:] = 0
    for t in range(begin, end):
        z_C = probs_TC[t]
        top, s, best = z_C[0], _F(0), 0
        for c in range(1, classes):
            top = max(top, z_C[c])
        for c in range(classes):
            z_C[c] = np.exp(z_C[c] - top)
            s += z_C[c]
        for c in range(classes):
            z_C[c] /= s
            if z_C[c] + balance_C[c] > z_C[best] + balance_C[best]:
                best = c
        expert_T[t] = best
        begin_C[best] += 1
    end_slot = begin
    for c in range(classes):
        begin_C[c], end_slot = end_slot, end_slot + begin_C[c]
    begin_C[classes] = begin_C[classes - 1]
    for t in range(begin, end):
        c = expert_T[t]
        if c < classes - 1:
            slot_T[t] = begin_C[c]
            copy_line(unit_TD, t * unit_TD.shape[1], sorted_ID, begin_C[c] * unit_TD.shape[1], unit_TD.shape[1])
            begin_C[c] += 1
        else:
            slot_T[t] = -1
    for c in range(classes - 1, 0, -1):
        begin_C[c] = begin_C[c - 1]
    begin_C[0] = begin


@compiled()
def experts(sorted_ID, begin_C, gate_up_EPDW, down_EPFW, gate_up_I2F, inner_IF, out_ID):
    """Each expert over its slots: down (silu(gate) * up)."""
    size = inner_IF.shape[1]
    for e in range(gate_up_EPDW.shape[0]):
        if begin_C[e + 1] > begin_C[e]:
            product_of(sorted_ID, begin_C[e], begin_C[e + 1], gate_up_EPDW[e], gate_up_I2F)
            for i in range(begin_C[e], begin_C[e + 1]):
                silu_line(gate_up_I2F, 2 * i * size, gate_up_I2F, (2 * i + 1) * size, inner_IF, i * size, size)
            product_of(inner_IF, begin_C[e], begin_C[e + 1], down_EPFW[e], out_ID)


@compiled()
def combine(begin, end, out_ID, slot_T, expert_T, probs_TC, bias_D, residual_TD, scale_D, floor, unit_TD):
    """residual = weight * expert's output + bias + residual * scale, in place, and its `unit`."""
    for t in range(begin, end):
        slot, weight = slot_T[t], probs_TC[t, expert_T[t]]
        for d in range(residual_TD.shape[1]):
            residual_TD[t, d] = bias_D[d] + residual_TD[t, d] * scale_D[d]
        if slot >= 0:
            for d in range(residual_TD.shape[1]):
                residual_TD[t, d] += out_ID[slot, d] * weight
        r = _F(1.0) / np.sqrt(squares(residual_TD, t * residual_TD.shape[1], residual_TD.shape[1]) + floor)
        for d in range(residual_TD.shape[1]):
            unit_TD[t, d] = residual_TD[t, d] * r
