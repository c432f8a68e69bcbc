"""What stands between the matrix products of `forward`, compiled by numba: a few calls a layer instead of tens of operations.

Invariants:
- Rows share nothing: what a row gets is summed in an order that its own prefix decides, whatever stands beside it. So the sums
  that the compiler may add up in any order are functions of their own (`_ANY_ORDER`); the rest is computed as written.
- Arrays are float32 and contiguous, given by the caller; nothing is allocated for a row.

Legend: as in `forward`; I slots of rows sorted by expert, L keys.
"""

from __future__ import annotations

import numpy as np

from .compiled import compiled

_ANY_ORDER = frozenset({"reassoc", "contract", "nsz"})
"""Of sums. They read and do not write, so nothing but their length decides how they are vectorised. Of all else the numbers are
the same, vectorised or not, with or without room between two arrays."""
_F = np.float32


@compiled(_ANY_ORDER)
def _sum(x, count):
    s = _F(0)
    for i in range(count):
        s += x[i]
    return s


@compiled(_ANY_ORDER)
def _squares(x):
    s = _F(0)
    for i in range(x.shape[0]):
        s += x[i] * x[i]
    return s


@compiled()
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


@compiled()
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


@compiled()
def unit(residual_TD, floor, unit_TD):
    """x / sqrt(sum x^2 + floor): RMS norm but for its weight and the square root of its size."""
    for t in range(residual_TD.shape[0]):
        r = _F(1.0) / np.sqrt(_squares(residual_TD[t]) + floor)
        for d in range(residual_TD.shape[1]):
            unit_TD[t, d] = residual_TD[t, d] * r


@compiled()
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


@compiled()
def turn(mixed_NTO, projected, bias_NO, temperature_N, cos_TO, sin_TO, half, previous_TW, write_T, k_pool, v_pool,
         q_THD, k_TGD, v_TGD):  # fmt: skip
    """Means, norm, temperature and RoPE of queries and keys; values; keys and values of clean rows into the cache."""
    rows, heads, size = q_THD.shape
    kv_heads, width = k_TGD.shape[1], previous_TW.shape[1]
    means = (heads + kv_heads) * size + 2 * width
    current = (heads + kv_heads) * size + width
    for t in range(rows):
        for n in range(heads + kv_heads):
            for e in range(size):
                mixed_NTO[n, t, e] = mixed_NTO[n, t, e] + bias_NO[n, e] + projected[t, means + n * size + e]
            f = temperature_N[n] / max(np.sqrt(_squares(mixed_NTO[n, t])), _F(1.1920929e-07))
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


@compiled()
def _add_scores(q, keys_DL, begin, end, score):
    """q . k of keys begin .. end - 1, each added up in the order of its features. Four products a turn are what makes it fast;
    their order is kept."""
    size = q.shape[0]
    for i in range(end - begin):
        score[i] = 0
    for e in range(0, size // 4 * 4, 4):
        q0, q1, q2, q3 = q[e], q[e + 1], q[e + 2], q[e + 3]
        k0, k1 = keys_DL[e, begin:end], keys_DL[e + 1, begin:end]
        k2, k3 = keys_DL[e + 2, begin:end], keys_DL[e + 3, begin:end]
        for i in range(end - begin):
            score[i] = score[i] + q0 * k0[i] + q1 * k1[i] + q2 * k2[i] + q3 * k3[i]
    for e in range(size // 4 * 4, size):
        q0, k0 = q[e], keys_DL[e, begin:end]
        for i in range(end - begin):
            score[i] += q0 * k0[i]


@compiled()
def _add_values(weight, values_LD, begin, end, out):
    """Adds the weighted values begin .. end - 1 to out, in their order, four a turn."""
    count, size = end - begin, out.shape[0]
    for i in range(0, count // 4 * 4, 4):
        w0, w1, w2, w3 = weight[i], weight[i + 1], weight[i + 2], weight[i + 3]
        v0, v1 = values_LD[begin + i], values_LD[begin + i + 1]
        v2, v3 = values_LD[begin + i + 2], values_LD[begin + i + 3]
        for e in range(size):
            out[e] = out[e] + w0 * v0[e] + w1 * v1[e] + w2 * v2[e] + w3 * v3[e]
    for i in range(count // 4 * 4, count):
        w0, v0 = weight[i], values_LD[begin + i]
        for e in range(size):
            out[e] += w0 * v0[e]


@compiled()
def attend(q_THD, k_TGD, v_TGD, k_pool, v_pool, range_6T, first_S1, place_SL, scale, keys_DL, values_LD, score_L, scratch_L,
           out_THD):  # fmt: skip
    """Attention of each row over the cached positions, clean rows and rows of its block that it sees, in this order.

    Keys and values of a sequence and head are laid side by side first, cached ones in front: keys turned, so that the scores of
    many of them are added up at once."""
    kv_heads, size = k_TGD.shape[1], k_TGD.shape[2]
    group = q_THD.shape[1] // kv_heads
    for s in range(first_S1.shape[0] - 1):
        first, last = first_S1[s], first_S1[s + 1]
        past = 0
        for t in range(first, last):
            past = max(past, range_6T[1, t])
        for g in range(kv_heads):
            for p in range(past):
                place = place_SL[s, p]
                for e in range(size):
                    keys_DL[e, p] = k_pool[place, g, e]
                    values_LD[p, e] = v_pool[place, g, e]
            for t in range(first, last):
                for e in range(size):
                    keys_DL[e, past + t - first] = k_TGD[t, g, e]
                    values_LD[past + t - first, e] = v_TGD[t, g, e]
            for t in range(first, last):
                for h in range(g * group, (g + 1) * group):
                    out, count = out_THD[t, h], 0
                    for part in range(3):
                        shift = past if part else 0
                        begin = range_6T[2 * part, t] + shift
                        end = max(range_6T[2 * part + 1, t] + shift, begin)
                        _add_scores(q_THD[t, h], keys_DL, begin, end, score_L[count : count + end - begin])
                        count += end - begin
                    top = _F(-np.inf)
                    for i in range(count):
                        score_L[i] *= scale
                    for i in range(count):
                        top = max(top, score_L[i])
                    for i in range(count):
                        score_L[i] -= top
                    _exp(score_L, count, scratch_L)
                    for e in range(size):
                        out[e] = 0
                    count = 0
                    for part in range(3):
                        shift = past if part else 0
                        begin = range_6T[2 * part, t] + shift
                        end = max(range_6T[2 * part + 1, t] + shift, begin)
                        _add_values(score_L[count : count + end - begin], values_LD, begin, end, out)
                        count += end - begin
                    total = _sum(score_L, count)
                    for e in range(size):
                        out[e] /= total


@compiled()
def add_unit(y_TD, bias_D, residual_TD, scale_D, floor, unit_TD):
    """residual = y + bias + residual * scale, in place, and its `unit`."""
    for t in range(residual_TD.shape[0]):
        for d in range(residual_TD.shape[1]):
            residual_TD[t, d] = y_TD[t, d] + bias_D[d] + residual_TD[t, d] * scale_D[d]
        r = _F(1.0) / np.sqrt(_squares(residual_TD[t]) + floor)
        for d in range(residual_TD.shape[1]):
            unit_TD[t, d] = residual_TD[t, d] * r


@compiled()
def route(state_TP, bias_P, below_TP, scale_P, floor, fc1_PP, fc1_bias_P, fc2_PP, fc2_bias_P, out_PC, balance_C, unit_TD,
          probs_TC, expert_T, slot_T, begin_C, sorted_ID, a_P, b_P, e_P, scratch_P):  # fmt: skip
    """The router after its down projection, and rows sorted by expert. `scale_P` is empty in the first layer.

    `begin_C[c]`: first slot of class c, and the slots in use at the end. An expert's only row has a second slot beside its own,
    as no product may have one row. `slot_T`: where each row went, -1 for the skip expert."""
    rows, width = state_TP.shape
    classes = balance_C.shape[0]
    for t in range(rows):
        for p in range(width):
            state_TP[t, p] += bias_P[p]
        for p in range(scale_P.shape[0]):
            state_TP[t, p] += below_TP[t, p] * scale_P[p]
        r = _F(1.0) / np.sqrt(_squares(state_TP[t]) + floor)
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


@compiled()
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


@compiled()
def combine(out_ID, slot_T, expert_T, probs_TC, bias_D, residual_TD, scale_D, floor, unit_TD):
    """residual = weight * expert's output + bias + residual * scale, in place, and its `unit`."""
    for t in range(residual_TD.shape[0]):
        slot, weight = slot_T[t], probs_TC[t, expert_T[t]]
        for d in range(residual_TD.shape[1]):
            residual_TD[t, d] = bias_D[d] + residual_TD[t, d] * scale_D[d]
        if slot >= 0:
            for d in range(residual_TD.shape[1]):
                residual_TD[t, d] += out_ID[slot, d] * weight
        r = _F(1.0) / np.sqrt(_squares(residual_TD[t]) + floor)
        for d in range(residual_TD.shape[1]):
            unit_TD[t, d] = residual_TD[t, d] * r
