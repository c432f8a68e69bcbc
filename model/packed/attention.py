"""Attention of `forward`, compiled by numba: over the cached positions and clean rows that a row sees, then over its block.

Invariants:
- A row's sums run over its keys in an order that the keys' numbers alone decide, whatever stands beside it in the pack and
  however much of its prefix is cached.
- Keys are taken `LANES` at a time. What lies past a row's last key is finite, and weighs nothing.

Legend: as in `forward`; U heads of a key head, L keys.
"""

from __future__ import annotations

import numpy as np

from ...kernels.compiled import FUSED, compiled, exponentials, largest, total

LANES = 8
_F = np.float32


def padded(keys: int) -> int:
    """Room that so many keys of a sequence take."""
    return -(-keys // LANES) * LANES + LANES


@compiled()
def _gather(k_TGD, v_TGD, k_pool, v_pool, g, first, last, start, place_L, keys_DL, values_LD):
    """Keys and values of a sequence and head side by side, cached ones in front: keys turned, so that the scores of many of them
    are added up at once."""
    size, count = k_TGD.shape[2], start + last - first
    for p in range(start):
        place = place_L[p]
        for e in range(size):
            keys_DL[e, p] = k_pool[place, g, e]
            values_LD[p, e] = v_pool[place, g, e]
    for t in range(first, last):
        for e in range(size):
            keys_DL[e, start + t - first] = k_TGD[t, g, e]
            values_LD[start + t - first, e] = v_TGD[t, g, e]
    for p in range(count, count + LANES):
        for e in range(size):
            keys_DL[e, p] = 0
            values_LD[p, e] = 0


@compiled(FUSED)
def _put_scores(q0_D, q1_D, keys_DL, begin, count, score0_L, score1_L):
    """q . k of `count` keys from `begin` on, of two queries, each added up in the order of its features, four a turn."""
    size = q0_D.shape[0]
    for i in range(count):
        score0_L[i] = 0
        score1_L[i] = 0
    for e in range(0, size // 4 * 4, 4):
        a0, a1, a2, a3 = q0_D[e], q0_D[e + 1], q0_D[e + 2], q0_D[e + 3]
        b0, b1, b2, b3 = q1_D[e], q1_D[e + 1], q1_D[e + 2], q1_D[e + 3]
        k0, k1 = keys_DL[e, begin : begin + count], keys_DL[e + 1, begin : begin + count]
        k2, k3 = keys_DL[e + 2, begin : begin + count], keys_DL[e + 3, begin : begin + count]
        for i in range(count):
            score0_L[i] = score0_L[i] + a0 * k0[i] + a1 * k1[i] + a2 * k2[i] + a3 * k3[i]
            score1_L[i] = score1_L[i] + b0 * k0[i] + b1 * k1[i] + b2 * k2[i] + b3 * k3[i]
    for e in range(size // 4 * 4, size):
        a0, b0 = q0_D[e], q1_D[e]
        k = keys_DL[e, begin : begin + count]
        for i in range(count):
            score0_L[i] = score0_L[i] + a0 * k[i]
            score1_L[i] = score1_L[i] + b0 * k[i]


@compiled(FUSED)
def _add_values(weight0_L, weight1_L, values_LD, begin, count, sum0_D, sum1_D):
    """Adds the weighted values of `count` keys from `begin` on to two rows of features, four keys a turn."""
    for i in range(0, count, 4):
        a0, a1, a2, a3 = weight0_L[i], weight0_L[i + 1], weight0_L[i + 2], weight0_L[i + 3]
        b0, b1, b2, b3 = weight1_L[i], weight1_L[i + 1], weight1_L[i + 2], weight1_L[i + 3]
        v0, v1, v2, v3 = values_LD[begin + i], values_LD[begin + i + 1], values_LD[begin + i + 2], values_LD[begin + i + 3]
        for e in range(sum0_D.shape[0]):
            sum0_D[e] = sum0_D[e] + a0 * v0[e] + a1 * v1[e] + a2 * v2[e] + a3 * v3[e]
            sum1_D[e] = sum1_D[e] + b0 * v0[e] + b1 * v1[e] + b2 * v2[e] + b3 * v3[e]


@compiled()
def _to_weights(score_L, clean, room, block):
    """exp of `clean` scores and, from `room` on, of `block` scores, over the largest; 0 between and after. Returns their sum."""
    top, count = largest(score_L, clean), room + -(-block // LANES) * LANES
    if block:
        top = max(top, largest(score_L[room:], block))
    for i in range(count):
        score_L[i] -= top
    exponentials(score_L, count)
    for i in range(clean, room):
        score_L[i] = 0
    for i in range(room + block, count):
        score_L[i] = 0
    return total(score_L, count)


@compiled()
def attend(q_THD, k_TGD, v_TGD, k_pool, v_pool, range_4T, first_S1, start_S, place_SL, keys_DL, values_LD, score0_L, score1_L,
           sum0_D, sum1_D, out_THD):  # fmt: skip
    """Attention of each row, of queries that carry their scale; two heads at a time."""
    kv_heads, size = k_TGD.shape[1], k_TGD.shape[2]
    group = q_THD.shape[1] // kv_heads
    for s in range(start_S.shape[0]):
        first, last = first_S1[s], first_S1[s + 1]
        for g in range(kv_heads):
            _gather(k_TGD, v_TGD, k_pool, v_pool, g, first, last, start_S[s], place_SL[s], keys_DL, values_LD)
            for t in range(first, last):
                begin, block_begin = range_4T[0, t], range_4T[2, t]
                clean, block = range_4T[1, t] - begin, range_4T[3, t] - block_begin
                clean_room, block_room = -(-clean // LANES) * LANES, -(-block // LANES) * LANES
                for u in range(0, group, 2):
                    h0, h1 = g * group + u, g * group + min(u + 1, group - 1)
                    q0_D, q1_D = q_THD[t, h0], q_THD[t, h1]
                    block0_L, block1_L = score0_L[clean_room:], score1_L[clean_room:]
                    _put_scores(q0_D, q1_D, keys_DL, begin, clean_room, score0_L, score1_L)
                    _put_scores(q0_D, q1_D, keys_DL, block_begin, block_room, block0_L, block1_L)
                    total0 = _to_weights(score0_L, clean, clean_room, block)
                    total1 = _to_weights(score1_L, clean, clean_room, block)
                    sum0_D[:] = 0
                    sum1_D[:] = 0
                    _add_values(score0_L, score1_L, values_LD, begin, clean_room, sum0_D, sum1_D)
                    _add_values(block0_L, block1_L, values_LD, block_begin, block_room, sum0_D, sum1_D)
                    for e in range(size):
                        out_THD[t, h0, e] = sum0_D[e] / total0
                        out_THD[t, h1, e] = sum1_D[e] / total1
