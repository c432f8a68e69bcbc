"""Attention of `PackedBackend` over the clean keys and the mask block that a row sees, compiled by numba. Several rows of a
sequence are computed at once, as two products with the softmax between them.

Invariants:
- A row sums over its keys in the order of their numbers. Neither the rest of the pack nor the cached part of a clean row's prefix
  changes that order.
- Scores of clean rows are float64 until the largest is subtracted. A float32 score of 16 is rounded by up to 1e-6, and so is its
  weight: of all roundings in a pass, those of the scores are what a log-probability shows most.
- Keys are taken `LANES` at a time. The numbers past a row's last key are finite, and their weight is zero.

Legend: as in `backend`; L keys, R queries computed at once, of all heads of a key head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ....kernels.attention.numba import weigh
from ....kernels.compiled import compiled
from ....kernels.lanes import LANES as REGISTER
from ....kernels.lanes import copy_line, turn
from ....kernels.linear.numba import STEP, WIDTH, product_with_rows, wide_product_with_rows
from ....kernels.lines import divide_line, total, widen_line

LANES = 8
_MOST_QUERIES = 32
"""Most queries that are computed at once. More clean ones would see many keys that the first of them does not see."""


class Lines(NamedTuple):
    """Working memory of one sequence: keys and values of all its key heads side by side (K: features of all of them), and
    queries, scores, weights and results of some rows of one. All float32 but for `wide_q_RD` and `wide`. That of several parts of
    a pass has the parts in front (`lines_of`)."""

    key_LK: np.ndarray
    keys_KL: np.ndarray
    values_LK: np.ndarray
    q_RD: np.ndarray
    wide_q_RD: np.ndarray
    wide: np.ndarray
    score: np.ndarray
    attended_RD: np.ndarray

    @classmethod
    def of(cls, parts: int, group: int, kv_heads: int, size: int, width: int, take: Callable[..., np.ndarray]) -> Lines:
        """Of several parts.

        Args:
            group: query heads of a key head. size: D. width: of `width_of`. take: gives float32 memory by name and shape.
        """
        features, rows = -(-size // WIDTH) * WIDTH, max(1, _MOST_QUERIES // group) * group
        kept, behind = kv_heads * size, -(-(features - size) // (kv_heads * size))  # what is read beside the last head's values
        return cls(
            take("key rows", parts, width, kept), take("keys", parts, kept, width), take("values", parts, width + behind, kept),
            take("queries", parts, rows, size),
            take("wide queries", parts, 2 * rows * size).view(np.float64).reshape(-1, rows, size),
            take("wide scores", parts, 2 * rows * width).view(np.float64), take("scores and sums", parts, rows * (width + 1)),
            take("attended by a head", parts, rows, features),
        )  # fmt: skip


def width_of(longest: int) -> int:
    """Width of the working memory for so many keys."""
    return -(-(longest + LANES) // WIDTH) * WIDTH


@compiled()
def lines_of(lines, part):
    """That of one part."""
    return Lines(
        lines.key_LK[part], lines.keys_KL[part], lines.values_LK[part], lines.q_RD[part], lines.wide_q_RD[part],
        lines.wide[part], lines.score[part], lines.attended_RD[part],
    )  # fmt: skip


@compiled()
def _gather(k_TGD, v_TGD, k_pool, v_pool, first, last, start, place_L, key_LK, keys_KL, values_LK):
    """Keys and values of a sequence side by side, cached ones in front: keys turned, so that the scores of many of them are added
    up at once. Zeros behind them: keys up to a multiple of a register, and at least `LANES` values, which a row reads if its
    window begins between two multiples of `LANES`.

    Cached keys are turned where they lie as long as whole registers of them lie side by side, and all others as copies."""
    kept, p, turned = key_LK.shape[1], 0, 0
    k_LK = k_pool.reshape(-1, kept)
    while p < start:
        place, end = place_L[p], p + 1
        while end < start and place_L[end] == place + end - p:
            end += 1
        begin = p
        if turned == p:
            begin = turned = p + (end - p) // REGISTER * REGISTER
            turn(k_LK, place, turned - p, keys_KL, p)
        copy_line(k_pool, (place + begin - p) * kept, key_LK, begin * kept, (end - begin) * kept)
        copy_line(v_pool, place * kept, values_LK, p * kept, (end - p) * kept)
        p = end
    copy_line(k_TGD, first * kept, key_LK, start * kept, (last - first) * kept)
    copy_line(v_TGD, first * kept, values_LK, start * kept, (last - first) * kept)
    count = start + last - first
    whole = -(-count // REGISTER) * REGISTER
    key_LK[count:whole] = 0
    values_LK[count : max(whole, count + LANES)] = 0
    turn(key_LK, turned, whole - turned, keys_KL, turned)


@compiled()
def _attend_clean(begin_T, end_T, q_THD, g, group, lines, out_THD, first, last):
    """Attention of the clean rows first..last of a sequence, of `group` heads from head g * group on. Each score adds up its
    features in their order, and each output its keys in theirs: a key that a row does not see has weight 0 and changes no sum."""
    q_RD, wide, score, attended_RD = lines.wide_q_RD, lines.wide, lines.score, lines.attended_RD
    size, features = q_THD.shape[2], attended_RD.shape[1]
    low, high, rows = begin_T[first], 0, (last - first) * group
    for t in range(first, last):
        widen_line(q_THD, (t * q_THD.shape[1] + g * group) * size, q_RD, (t - first) * group * size, group * size)
        low = min(low, begin_T[t])
        high = max(high, begin_T[t] + -(-(end_T[t] - begin_T[t]) // LANES) * LANES)
    low = low // STEP * STEP
    width = -(-(high - low) // STEP) * STEP
    score_RL, sum_R = score[: rows * width].reshape(rows, width), score[len(score) - rows :]
    wide_RL = wide[: rows * width].reshape(rows, width)
    wide_product_with_rows(q_RD, rows, size, lines.keys_KL, g * size, low, width, wide_RL)
    for t in range(first, last):
        r, begin, end = (t - first) * group, begin_T[t] - low, end_T[t] - low
        weigh(wide, r * width, group, width, begin, end, 0, 0, score, r * width)
        for each in range(r, r + group):
            sum_R[each] = total(score, each * width + begin, -(-(end - begin) // LANES) * LANES)
    product_with_rows(score_RL, rows, high - low, lines.values_LK, low, g * size, features, attended_RD)
    for t in range(first, last):
        for u in range(group):
            r = (t - first) * group + u
            divide_line(attended_RD, r * features, sum_R[r], out_THD, (t * q_THD.shape[1] + g * group + u) * size, size)


@compiled()
def _attend_masks(range_4T, q_THD, g, group, lines, out_THD, keys, first, last):
    """Attention of the mask rows first..last of a sequence of so many keys, of `group` heads from head g * group on."""
    q_RD, score, attended_RD = lines.q_RD, lines.score, lines.attended_RD
    size, features, rows = q_THD.shape[2], attended_RD.shape[1], (last - first) * group
    for t in range(first, last):
        copy_line(q_THD, (t * q_THD.shape[1] + g * group) * size, q_RD, (t - first) * group * size, group * size)
    width = -(-keys // STEP) * STEP
    score_RL, sum_R = score[: rows * width].reshape(rows, width), score[len(score) - rows :]
    product_with_rows(q_RD, rows, size, lines.keys_KL, g * size, 0, width, score_RL)
    for t in range(first, last):
        r, (begin, end, begin_block, end_block) = (t - first) * group, range_4T[:, t]
        weigh(score, r * width, group, width, begin, end, begin_block, end_block, score, r * width)
        for each in range(r, r + group):
            sum_R[each] = total(score, each * width, -(-keys // LANES) * LANES)
    product_with_rows(score_RL, rows, keys, lines.values_LK, 0, g * size, features, attended_RD)
    for t in range(first, last):
        for u in range(group):
            r = (t - first) * group + u
            divide_line(attended_RD, r * features, sum_R[r], out_THD, (t * q_THD.shape[1] + g * group + u) * size, size)


@compiled()
def attend(begin_s, end_s, plan, window, q_THD, k_TGD, v_TGD, k_pool, v_pool, lines, out_THD):
    """Attention of some sequences of a plan, of queries that carry their scale. `window`: number of the layer's window."""
    kv_heads, range_4T = k_TGD.shape[1], plan.range_W4T[window]
    group = q_THD.shape[1] // kv_heads
    at_once = lines.q_RD.shape[0] // group
    for s in range(begin_s, end_s):
        first, mask, last, start = plan.first_S1[s], plan.mask_S[s], plan.first_S1[s + 1], plan.start_S[s]
        _gather(
            k_TGD, v_TGD, k_pool, v_pool, first, last, start, plan.place_SL[s], lines.key_LK, lines.keys_KL, lines.values_LK
        )  # fmt: skip
        for g in range(kv_heads):
            for t in range(first, mask, at_once):
                _attend_clean(range_4T[0], range_4T[1], q_THD, g, group, lines, out_THD, t, min(t + at_once, mask))
            for t in range(mask, last, at_once):
                _attend_masks(range_4T, q_THD, g, group, lines, out_THD, start + last - first, t, min(t + at_once, last))
