"""Attention of `PackedBackend` over the clean keys and the mask block that a row sees, compiled by numba. Clean rows are computed
one at a time; mask rows, many of which see the same keys, are computed as matrix products.

Invariants:
- A clean row sums over its keys in the order of their numbers. Neither the rest of the pack nor the cached part of its prefix
  changes that order.
- Scores of clean rows are float64 until the largest is subtracted. A float32 score of 16 is rounded by up to 1e-6, and so is its
  weight: of all roundings in a pass, those of the scores are what a log-probability shows most.
- Keys are taken `LANES` at a time. The numbers past a row's last key are finite, and their weight is zero.

Legend: as in `backend`; U heads of a key head, L keys, N sequences at once, R = U times the mask rows of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ....kernels.compiled import FUSED, compiled, copy, exponentials, largest, total
from ....kernels.linear.numba import WIDTH, product_with_rows
from .plan import PackedPlan

LANES = 8
_F64 = np.float64
_MOST_SHAPES = 256
"""Shapes of packs whose working memory is kept: `two_pass` alternates between two, and keys grow by `WIDTH` at a time."""
_MOST_SCORES = 2**16
"""Most scores of mask rows that are computed at once: they fit into a processor's second-level cache."""


@compiled()
def _gather(k_TGD, v_TGD, k_pool, v_pool, g, first, last, start, place_L, keys_DL, values_LD):
    """Keys and values of a sequence and head side by side, cached ones in front: keys turned, so that the scores of many of them
    are added up at once. Nothing behind them."""
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
    for e in range(size):
        keys_DL[e, count : count + LANES] = 0
    values_LD[count:] = 0


@compiled(FUSED)
def _put_scores(q0_D, q1_D, keys_DL, begin, count, score0_L, score1_L):
    """float64 q . k of `count` keys from `begin` on, of two queries, each added up in the order of its features, four a turn."""
    size = q0_D.shape[0]
    for i in range(count):
        score0_L[i] = 0
        score1_L[i] = 0
    for e in range(0, size // 4 * 4, 4):
        a0, a1, a2, a3 = _F64(q0_D[e]), _F64(q0_D[e + 1]), _F64(q0_D[e + 2]), _F64(q0_D[e + 3])
        b0, b1, b2, b3 = _F64(q1_D[e]), _F64(q1_D[e + 1]), _F64(q1_D[e + 2]), _F64(q1_D[e + 3])
        k0, k1 = keys_DL[e, begin : begin + count], keys_DL[e + 1, begin : begin + count]
        k2, k3 = keys_DL[e + 2, begin : begin + count], keys_DL[e + 3, begin : begin + count]
        for i in range(count):
            c0, c1, c2, c3 = _F64(k0[i]), _F64(k1[i]), _F64(k2[i]), _F64(k3[i])
            score0_L[i] = score0_L[i] + a0 * c0 + a1 * c1 + a2 * c2 + a3 * c3
            score1_L[i] = score1_L[i] + b0 * c0 + b1 * c1 + b2 * c2 + b3 * c3
    for e in range(size // 4 * 4, size):
        a0, b0 = _F64(q0_D[e]), _F64(q1_D[e])
        k = keys_DL[e, begin : begin + count]
        for i in range(count):
            c0 = _F64(k[i])
            score0_L[i] = score0_L[i] + a0 * c0
            score1_L[i] = score1_L[i] + b0 * c0


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
def _to_weights(score_L, clean, room, weight_L):
    """exp of `clean` float64 scores over the largest, rounded to float32; 0 from there to `room`. Returns their sum."""
    for i in range(room):
        weight_L[i] = score_L[i]
    top = _F64(largest(weight_L, clean))
    for i in range(room):
        weight_L[i] = score_L[i] - top
    exponentials(weight_L, room)
    for i in range(clean, room):
        weight_L[i] = 0
    return total(weight_L, room)


@compiled()
def _clean_rows(begin_s, end_s, apart, q_THD, k_TGD, v_TGD, k_pool, v_pool, range_4T, first_S1, mask_S, start_S, place_SL,
                keys_NGDL, values_NGLD, mask_q_NGRD, score0_L, score1_L, weight0_L, weight1_L, sum0_D, sum1_D,
                out_THD):  # fmt: skip
    """Attention of the clean rows of some sequences, of queries that carry their scale; two heads at a time. With `apart`, keys,
    values and the queries of mask rows are kept, of each sequence in a place of its own."""
    kv_heads, size = k_TGD.shape[1], k_TGD.shape[2]
    group = q_THD.shape[1] // kv_heads
    for s in range(begin_s, end_s):
        first, last, n = first_S1[s], first_S1[s + 1], s - begin_s if apart else 0
        for g in range(kv_heads):
            keys_DL, values_LD = keys_NGDL[n, g], values_NGLD[n, g]
            _gather(k_TGD, v_TGD, k_pool, v_pool, g, first, last, start_S[s], place_SL[s], keys_DL, values_LD)
            for t in range(first, mask_S[s]):
                begin = range_4T[0, t]
                count = range_4T[1, t] - begin
                room = -(-count // LANES) * LANES
                for u in range(0, group, 2):
                    h0, h1 = g * group + u, g * group + min(u + 1, group - 1)
                    _put_scores(q_THD[t, h0], q_THD[t, h1], keys_DL, begin, room, score0_L, score1_L)
                    total0, total1 = _to_weights(score0_L, count, room, weight0_L), _to_weights(score1_L, count, room, weight1_L)
                    sum0_D[:] = 0
                    sum1_D[:] = 0
                    _add_values(weight0_L, weight1_L, values_LD, begin, room, sum0_D, sum1_D)
                    for e in range(size):
                        out_THD[t, h0, e] = sum0_D[e] / total0
                        out_THD[t, h1, e] = sum1_D[e] / total1
            for t in range(mask_S[s], last):
                for u in range(group):
                    copy(q_THD[t, g * group + u], mask_q_NGRD[n, g, (t - mask_S[s]) * group + u])


@compiled()
def _score_masks(begin_s, end_s, group, range_4T, first_S1, mask_S, mask_q_NGRD, keys_NGDL, score_NGRL):
    """Scores of mask rows; -inf of keys that a row does not see."""
    size = mask_q_NGRD.shape[3]
    for s in range(begin_s, end_s):
        for g in range(score_NGRL.shape[1]):
            rows, n = (first_S1[s + 1] - mask_S[s]) * group, s - begin_s
            product_with_rows(mask_q_NGRD[n, g], rows, size, keys_NGDL[n, g], score_NGRL[n, g])
        for t in range(mask_S[s], first_S1[s + 1]):
            for g in range(score_NGRL.shape[1]):
                for u in range(group):
                    score_L = score_NGRL[s - begin_s, g, (t - mask_S[s]) * group + u]
                    score_L[: range_4T[0, t]] = -np.inf
                    score_L[range_4T[1, t] : range_4T[2, t]] = -np.inf
                    score_L[range_4T[3, t] :] = -np.inf


@compiled()
def _attend_masks(begin_s, end_s, group, first_S1, mask_S, start_S, weight_NGRL, values_NGLD, attended_NGRD, out_THD):
    """Weighted values of mask rows, to where they belong."""
    size = out_THD.shape[2]
    for s in range(begin_s, end_s):
        rows, n, keys = (first_S1[s + 1] - mask_S[s]) * group, s - begin_s, start_S[s] + first_S1[s + 1] - first_S1[s]
        for g in range(attended_NGRD.shape[1]):
            product_with_rows(weight_NGRL[n, g], rows, keys, values_NGLD[n, g], attended_NGRD[n, g])
            for t in range(mask_S[s], first_S1[s + 1]):
                for u in range(group):
                    copy(attended_NGRD[n, g, (t - mask_S[s]) * group + u, :size], out_THD[t, g * group + u])


@dataclass(frozen=True)
class _Work:
    """The working memory of packs of one shape; arrays as in the kernels.

    Attributes:
        pieces: begin and end of the sequences computed at once, and their scores and weights.
        lines: float64 scores of two heads, their weights, and two sums of features.
    """

    pieces: list[tuple[int, int, torch.Tensor, torch.Tensor]]
    lines: tuple[np.ndarray, ...]
    keys_NGDL: np.ndarray
    values_NGLD: np.ndarray
    q_NGRD: np.ndarray
    score_NGRL: np.ndarray
    weight_NGRL: np.ndarray
    attended_NGRD: np.ndarray


class Attention:
    """Attention of packs, with its working memory.

    Args:
        take: gives uninitialised memory by name and shape, as a tensor and an array of the same bytes.
    """

    def __init__(
        self, heads: int, kv_heads: int, size: int, take: Callable[..., tuple[torch.Tensor, np.ndarray]]
    ) -> None:
        self._group, self._kv_heads, self._size, self._take = heads // kv_heads, kv_heads, size, take
        self._works: dict[tuple[int, int, int], _Work] = {}
        self._places: list[int] = []

    def prepare(self, plan: PackedPlan) -> None:
        """Provide the working memory for packs of this plan."""
        shape = len(plan.start_S), -(-(plan.longest + LANES) // WIDTH) * WIDTH, plan.masks
        work = self._works.get(shape)
        if work is None:
            work, places = self._of(*shape)
            if places != self._places or len(self._works) >= _MOST_SHAPES:
                self._works.clear()  # memory that grew lies elsewhere
            self._works[shape], self._places = work, places
        self._work = work

    def _of(self, sequences: int, width: int, masks: int) -> tuple[_Work, list[int]]:
        """The working memory of a shape, and the addresses of its parts."""
        rows, take = masks * self._group, self._take
        at_once = min(max(1, _MOST_SCORES // (self._kv_heads * rows * width)), sequences) if rows else sequences
        count, features = at_once if rows else 1, -(-self._size // WIDTH) * WIDTH
        pairs = [
            take(name, count, self._kv_heads, *rest)
            for name, *rest in (
                ("keys", self._size, width), ("values", width, features), ("mask queries", rows, self._size),
                ("scores", rows, width), ("weights", rows, width), ("attended by masks", rows, features),
            )
        ]  # fmt: skip
        lines = [take(name, 2 * (width + LANES)) for name in ("line", "other line")]
        lines += [take(name, width + LANES) for name in ("line of weights", "other line of weights")]
        lines += [take(name, self._size) for name in ("features", "other features")]
        spans = [(s, min(s + at_once, sequences)) for s in range(0, sequences, at_once)]
        scores, weights = pairs[3][0], pairs[4][0]
        pieces = [(begin, end, scores[: end - begin], weights[: end - begin]) for begin, end in spans]
        wide = [array.view(_F64) for _, array in lines[:2]]
        work = _Work(pieces, (*wide, *(array for _, array in lines[2:])), *(array for _, array in pairs))
        return work, [tensor.untyped_storage().data_ptr() for tensor, _ in (*pairs, *lines)]

    def __call__(
        self, plan: PackedPlan, kind: str, q_THD: np.ndarray, k_TGD: np.ndarray, v_TGD: np.ndarray, k_pool: np.ndarray,
        v_pool: np.ndarray, out_THD: np.ndarray,
    ) -> None:  # fmt: skip
        """Writes out_THD, of the plan last prepared for. `kind`: the layer's type; queries carry their scale."""
        first, mask, ranges, group, work = plan.first_S1, plan.mask_S, plan.range_4T[kind], self._group, self._work
        for begin, end, score, weight in work.pieces:
            _clean_rows(
                begin, end, plan.masks > 0, q_THD, k_TGD, v_TGD, k_pool, v_pool, ranges, first, mask, plan.start_S, plan.place_SL,
                work.keys_NGDL, work.values_NGLD, work.q_NGRD, *work.lines, out_THD,
            )  # fmt: skip
            if plan.masks:
                _score_masks(begin, end, group, ranges, first, mask, work.q_NGRD, work.keys_NGDL, work.score_NGRL)
                torch.softmax(score, -1, out=weight)
                _attend_masks(
                    begin, end, group, first, mask, plan.start_S, work.weight_NGRL, work.values_NGLD, work.attended_NGRD, out_THD
                )
