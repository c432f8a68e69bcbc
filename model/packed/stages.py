"""What stands between the matrix products of `forward`, compiled by numba: a few calls a layer instead of tens of operations.

Invariants:
- Rows share nothing: what a row gets is summed in an order that its own prefix decides, whatever stands beside it.
- Arrays are float32 and contiguous, given by the caller; nothing is allocated for a row.

Legend: as in `forward`; I slots of rows sorted by expert, L keys.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_OPTIONS = {"cache": True, "fastmath": {"reassoc", "contract", "nsz", "arcp"}, "error_model": "numpy"}
_IN_ORDER = {"cache": True, "fastmath": {"contract"}, "error_model": "numpy"}
"""Of what is only right as it is bracketed."""
_F = np.float32


@njit(**_IN_ORDER)
def _exp(x, count, scratch):
    """exp of the first `count` of x, in place, to two units in the last place (the polynomial of Cephes' expf)."""
    bits = x.view(np.int32)
    for i in range(count):
        y = max(x[i], _F(-87.0))
        n = np.floor(y * _F(1.44269504) + _F(0.5))
        r = y - n * _F(0.693359375) + n * _F(2.12194440e-4)
        p = _F(1.9875691500e-4) * r + _F(1.3981999507e-3)
        p = p * r + _F(8.3334519073e-3)
        p = p * r + _F(4.1665795894e-2)
        p = p * r + _F(1.6666665459e-1)
        p = p * r + _F(5.0000001201e-1)
        x[i] = p * r * r + r + _F(1.0)
        scratch[i] = np.int32(n)
    for i in range(count):
        bits[i] += scratch[i] << 23


@njit(**_IN_ORDER)
def _gelu(x, count, e, scratch):
    """x Phi(x) in place; erf by Abramowitz and Stegun 7.1.26, within 1.5e-7."""
    for i in range(count):
        e[i] = -x[i] * x[i] * _F(0.5)
    _exp(e, count, scratch)
    for i in range(count):
        z = abs(x[i]) * _F(0.70710678)
        t = _F(1.0) / (_F(1.0) + _F(0.3275911) * z)
        p = _F(1.061405429) * t + _F(-1.453152027)
        p = p * t + _F(1.421413741)
        p = p * t + _F(-0.284496736)
        p = (p * t + _F(0.254829592)) * t
        tail = _F(0.5) * p * e[i]  # Phi(-|x|)
        x[i] = x[i] * (tail if x[i] < 0 else _F(1.0) - tail)


@njit(**_OPTIONS)
def unit(residual_TD, floor, unit_TD):
    """x / sqrt(sum x^2 + floor): RMS norm but for its weight and the square root of its size."""
    for t in range(residual_TD.shape[0]):
        s = _F(0)
        for d in range(residual_TD.shape[1]):
            s += residual_TD[t, d] * residual_TD[t, d]
        r = _F(1.0) / np.sqrt(s + floor)
        for d in range(residual_TD.shape[1]):
            unit_TD[t, d] = residual_TD[t, d] * r


@njit(**_OPTIONS)
def gather(projected, bias, source_TA, tail_T, before_W, x_pool, delayed_pool, x_NTE, previous_TW):
    """Adds the projection's bias; x of each row's ancestors, side by side by head, and the parent's delayed value. Then keeps
    rows in the tail: whoever reads an entry has read it by then."""
    rows, ancestors = source_TA.shape
    heads, width = x_NTE.shape[0], previous_TW.shape[1]
    size = x_NTE.shape[2] // ancestors
    channels = heads * size
    for t in range(rows):
        for c in range(projected.shape[1]):
            projected[t, c] += bias[c]
    for t in range(rows):
        for a in range(ancestors):
            s = source_TA[t, a]
            for n in range(heads):
                if s >= 0:
                    for e in range(size):
                        x_NTE[n, t, a * size + e] = projected[s, n * size + e]
                elif s < -1:
                    for e in range(size):
                        x_NTE[n, t, a * size + e] = x_pool[-2 - s, n * size + e]
                else:
                    for e in range(size):
                        x_NTE[n, t, a * size + e] = 0
        s = source_TA[t, 1]
        for w in range(width):
            if s >= 0:
                previous_TW[t, w] = projected[s, channels + w]
            elif s < -1:
                previous_TW[t, w] = delayed_pool[-2 - s, w]
            else:
                previous_TW[t, w] = before_W[w]
    for t in range(rows):
        if tail_T[t] >= 0:
            for c in range(channels):
                x_pool[tail_T[t], c] = projected[t, c]
            for w in range(width):
                delayed_pool[tail_T[t], w] = projected[t, channels + w]


@njit(**_OPTIONS)
def turn(mixed_NTO, projected, bias_NO, temperature_N, cos_TO, sin_TO, half, previous_TW, write_T, k_pool, v_pool,
         q_THD, k_TGD, v_TGD):  # fmt: skip
    """Means, norm, temperature and RoPE of queries and keys; values; keys and values of clean rows into the cache."""
    rows, heads, size = q_THD.shape
    kv_heads, width = k_TGD.shape[1], previous_TW.shape[1]
    means = (heads + kv_heads) * size + 2 * width
    current = (heads + kv_heads) * size + width
    for t in range(rows):
        for n in range(heads + kv_heads):
            s = _F(0)
            for e in range(size):
                y = mixed_NTO[n, t, e] + bias_NO[n, e] + projected[t, means + n * size + e]
                mixed_NTO[n, t, e] = y
                s += y * y
            f = temperature_N[n] / max(np.sqrt(s), _F(1.1920929e-07))
            to = q_THD[t, n] if n < heads else k_TGD[t, n - heads]
            for e in range(half):
                left, right = mixed_NTO[n, t, e] * f, mixed_NTO[n, t, e + half] * f
                to[e] = left * cos_TO[t, e] + right * sin_TO[t, e]
                to[e + half] = right * cos_TO[t, e + half] + left * sin_TO[t, e + half]
            for e in range(2 * half, size):
                to[e] = mixed_NTO[n, t, e] * f
        flat = v_TGD[t].reshape(-1)
        for w in range(width):
            flat[w] = projected[t, current + w]
            flat[w + width] = previous_TW[t, w]
        if write_T[t] >= 0:
            k_pool[write_T[t]] = k_TGD[t]
            v_pool[write_T[t]] = v_TGD[t]


@njit(**_OPTIONS)
def _score(q_D, key_D, scale):
    s = _F(0)
    for e in range(q_D.shape[0]):
        s += q_D[e] * key_D[e]
    return s * scale


@njit(**_OPTIONS)
def _add(out_D, weight, value_D):
    for e in range(out_D.shape[0]):
        out_D[e] += weight * value_D[e]


@njit(**_OPTIONS)
def attend(q_THD, k_TGD, v_TGD, k_pool, v_pool, range_6T, first_S1, place_SL, scale, score_L, scratch_L, out_THD):
    """Attention of each row over the cached positions, clean rows and rows of its block that it sees, in this order."""
    heads, size = q_THD.shape[1:]
    group = heads // k_TGD.shape[1]
    for s in range(first_S1.shape[0] - 1):
        for t in range(first_S1[s], first_S1[s + 1]):
            for h in range(heads):
                g, n = h // group, 0
                for p in range(range_6T[0, t], range_6T[1, t]):
                    score_L[n] = _score(q_THD[t, h], k_pool[place_SL[s, p], g], scale)
                    n += 1
                for part in (2, 4):
                    for j in range(first_S1[s] + range_6T[part, t], first_S1[s] + range_6T[part + 1, t]):
                        score_L[n] = _score(q_THD[t, h], k_TGD[j, g], scale)
                        n += 1
                top = score_L[0]
                for i in range(n):
                    top = max(top, score_L[i])
                for i in range(n):
                    score_L[i] -= top
                _exp(score_L, n, scratch_L)
                out = out_THD[t, h]
                total = _F(0)
                for i in range(n):
                    total += score_L[i]
                out[:] = 0
                n = 0
                for p in range(range_6T[0, t], range_6T[1, t]):
                    _add(out, score_L[n], v_pool[place_SL[s, p], g])
                    n += 1
                for part in (2, 4):
                    for j in range(first_S1[s] + range_6T[part, t], first_S1[s] + range_6T[part + 1, t]):
                        _add(out, score_L[n], v_TGD[j, g])
                        n += 1
                for e in range(size):
                    out[e] /= total


@njit(**_OPTIONS)
def add_unit(y_TD, bias_D, residual_TD, scale_D, floor, unit_TD):
    """residual = y + bias + residual * scale, in place, and its `unit`."""
    for t in range(residual_TD.shape[0]):
        s = _F(0)
        for d in range(residual_TD.shape[1]):
            z = y_TD[t, d] + bias_D[d] + residual_TD[t, d] * scale_D[d]
            residual_TD[t, d] = z
            s += z * z
        r = _F(1.0) / np.sqrt(s + floor)
        for d in range(residual_TD.shape[1]):
            unit_TD[t, d] = residual_TD[t, d] * r


@njit(**_OPTIONS)
def route(state_TP, bias_P, below_TP, scale_P, floor, fc1_PP, fc1_bias_P, fc2_PP, fc2_bias_P, out_PC, balance_C, unit_TD,
          probs_TC, expert_T, slot_T, begin_C, sorted_ID, a_P, b_P, e_P, scratch_P):  # fmt: skip
    """The router after its down projection, and rows sorted by expert. `scale_P` is empty in the first layer.

    `begin_C[c]`: first slot of class c, and the slots in use at the end. An expert's only row has a second slot beside its own,
    as no product may have one row. `slot_T`: where each row went, -1 for the skip expert."""
    rows, width = state_TP.shape
    classes = balance_C.shape[0]
    for t in range(rows):
        s = _F(0)
        for p in range(width):
            x = state_TP[t, p] + bias_P[p]
            if scale_P.shape[0]:
                x += below_TP[t, p] * scale_P[p]
            state_TP[t, p] = x
            s += x * x
        r = _F(1.0) / np.sqrt(s + floor)
        a_P[:] = fc1_bias_P
        for i in range(width):
            x = state_TP[t, i] * r
            for p in range(width):
                a_P[p] += x * fc1_PP[i, p]
        _gelu(a_P, width, e_P, scratch_P)
        b_P[:] = fc2_bias_P
        for i in range(width):
            x = a_P[i]
            for p in range(width):
                b_P[p] += x * fc2_PP[i, p]
        _gelu(b_P, width, e_P, scratch_P)
        z_C = probs_TC[t]
        z_C[:] = 0
        for i in range(width):
            for c in range(classes):
                z_C[c] += b_P[i] * out_PC[i, c]
        top = z_C.max()
        s = _F(0)
        for c in range(classes):
            z_C[c] = np.exp(z_C[c] - top)
            s += z_C[c]
        best = 0
        for c in range(classes):
            z_C[c] /= s
            if z_C[c] + balance_C[c] > z_C[best] + balance_C[best]:
                best = c
        expert_T[t] = best
    begin_C[:] = 0
    for t in range(rows):
        begin_C[expert_T[t] + 1] += 1
    for c in range(classes - 1):
        count = begin_C[c + 1]
        begin_C[c + 1] = begin_C[c] + (2 if count == 1 else count)
    begin_C[classes] = begin_C[classes - 1]
    for c in range(classes - 1):
        at = begin_C[c]
        for t in range(rows):
            if expert_T[t] == c:
                slot_T[t] = at
                sorted_ID[at] = unit_TD[t]
                at += 1
    for t in range(rows):
        if expert_T[t] == classes - 1:
            slot_T[t] = -1


@njit(**_OPTIONS)
def activate(gate_up_I2F, count, inner_IF, scratch_F):
    """silu(gate) * up."""
    size = inner_IF.shape[1]
    for i in range(count):
        inner = inner_IF[i]
        for f in range(size):
            inner[f] = -gate_up_I2F[i, f]
        for f in range(size):
            inner[f] = min(inner[f], _F(87.0))
        _exp(inner, size, scratch_F)
        for f in range(size):
            inner[f] = gate_up_I2F[i, f] / (_F(1.0) + inner[f]) * gate_up_I2F[i, size + f]


@njit(**_OPTIONS)
def combine(out_ID, slot_T, expert_T, probs_TC, bias_D, residual_TD, scale_D, floor, unit_TD):
    """residual = weight * expert's output + bias + residual * scale, in place, and its `unit`."""
    for t in range(residual_TD.shape[0]):
        s = _F(0)
        slot, weight = slot_T[t], probs_TC[t, expert_T[t]]
        for d in range(residual_TD.shape[1]):
            z = bias_D[d] + residual_TD[t, d] * scale_D[d]
            if slot >= 0:
                z += out_ID[slot, d] * weight
            residual_TD[t, d] = z
            s += z * z
        r = _F(1.0) / np.sqrt(s + floor)
        for d in range(residual_TD.shape[1]):
            unit_TD[t, d] = residual_TD[t, d] * r
