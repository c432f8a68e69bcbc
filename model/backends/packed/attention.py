"""Attention of `PackedBackend` over the clean keys and the mask block that a row sees, compiled by numba. Several rows of a
sequence are computed at once, as two products with the softmax between them.

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

from ....kernels.compiled import compiled, exponentials, largest, total
from ....kernels.lanes import LANES as REGISTER
from ....kernels.lanes import copy_line, turn
from ....kernels.linear.numba import WIDTH, product_with_rows, wide_product_with_rows
from .plan import PackedPlan

LANES = 8
_MOST_SHAPES = 256
"""Shapes of packs whose working memory is kept: `two_pass` alternates between two, and keys grow by `WIDTH` at a time."""
_MOST_QUERIES = 32
"""Most queries of clean rows that are computed at once. More would see many keys that the first of them does not see."""
_MOST_SCORES = 2**16
"""Most scores of mask rows that are computed at once: they fit into a processor's second-level cache."""


@compiled()
def _gather(k_TGD, v_TGD, k_pool, v_pool, g, first, last, start, place_L, key_LD, keys_DL, values_LD):
    """Keys and values of a sequence and head side by side, cached ones in front: keys turned, so that the scores of many of them
    are added up at once. Zeros behind them: keys up to a multiple of a register, and at least `LANES` values, which a row reads
    whose window begins between two multiples of `LANES`."""
    heads, size, features, new = k_TGD.shape[1], k_TGD.shape[2], values_LD.shape[1], last - first
    for p in range(start):
        at = (place_L[p] * heads + g) * size
        copy_line(k_pool, at, key_LD, p * size, size)
        copy_line(v_pool, at, values_LD, p * features, size)
    for n in range(new):
        at, p = ((first + n) * heads + g) * size, start + n
        copy_line(k_TGD, at, key_LD, p * size, size)
        copy_line(v_TGD, at, values_LD, p * features, size)
    count = start + new
    whole = -(-count // REGISTER) * REGISTER
    key_LD[count:whole] = 0
    values_LD[count : max(whole, count + LANES)] = 0
    turn(key_LD, whole, keys_DL)


@compiled()
def _attend(begin_T, end_T, q_THD, g, group, keys_DL, values_LD, q_RD, wide, score, attended_RD, out_THD, first, last):
    """Attention of the clean rows first..last of a sequence, of `group` heads from head g * group on. Each score adds up its
    features in their order, and each output its keys in theirs: a key that a row does not see has weight 0 and changes no sum."""
    size, features = q_THD.shape[2], values_LD.shape[1]
    low, high, rows = begin_T[first], 0, (last - first) * group
    for t in range(first, last):
        copy_line(q_THD, (t * q_THD.shape[1] + g * group) * size, q_RD, (t - first) * group * size, group * size)
        low = min(low, begin_T[t])
        high = max(high, begin_T[t] + -(-(end_T[t] - begin_T[t]) // LANES) * LANES)
    low = low // WIDTH * WIDTH
    width = -(-(high - low) // WIDTH) * WIDTH
    score_RL, sum_R = score[: rows * width].reshape(rows, width), score[len(score) - rows :]
    wide_RL = wide[: rows * width].reshape(rows, width)
    wide_product_with_rows(q_RD, rows, size, keys_DL, 0, low, width, wide_RL)
    for r in range(rows):
        t = first + r // group
        begin, score_L, wide_L = begin_T[t] - low, score_RL[r], wide_RL[r]
        for i in range(width):
            score_L[i] = wide_L[i]
        top = np.float64(largest(score_L[begin:], end_T[t] - begin_T[t]))
        for i in range(width):
            score_L[i] = wide_L[i] - top
    exponentials(score, rows * width)
    for r in range(rows):
        t = first + r // group
        begin, end, score_L = begin_T[t] - low, end_T[t] - low, score_RL[r]
        score_L[:begin] = 0
        score_L[end:] = 0
        sum_R[r] = total(score_L[begin:], -(-(end - begin) // LANES) * LANES)
    product_with_rows(score_RL, rows, high - low, values_LD, low, 0, features, attended_RD)
    for t in range(first, last):
        for u in range(group):
            r = (t - first) * group + u
            for e in range(size):
                out_THD[t, g * group + u, e] = attended_RD[r, e] / sum_R[r]


@compiled()
def _clean_rows(begin_s, end_s, apart, q_THD, k_TGD, v_TGD, k_pool, v_pool, range_4T, first_S1, mask_S, start_S, place_SL,
                keys_NGDL, values_NGLD, mask_q_NGRD, key_LD, q_RD, wide, score, attended_RD, out_THD):  # fmt: skip
    """Attention of the clean rows of some sequences, of queries that carry their scale. With `apart`, keys, values and mask
    queries are kept, those of each sequence in a place of its own."""
    kv_heads, size = k_TGD.shape[1], k_TGD.shape[2]
    heads = q_THD.shape[1]
    group = heads // kv_heads
    at_once = q_RD.shape[0] // group
    for s in range(begin_s, end_s):
        first, last, n = first_S1[s], first_S1[s + 1], s - begin_s if apart else 0
        for g in range(kv_heads):
            keys_DL, values_LD = keys_NGDL[n, g], values_NGLD[n, g]
            _gather(k_TGD, v_TGD, k_pool, v_pool, g, first, last, start_S[s], place_SL[s], key_LD, keys_DL, values_LD)
            for t in range(first, mask_S[s], at_once):
                end = min(t + at_once, mask_S[s])
                _attend(
                    range_4T[0], range_4T[1], q_THD, g, group, keys_DL, values_LD, q_RD, wide, score, attended_RD, out_THD, t, end
                )
            for t in range(mask_S[s], last):
                at = (t * heads + g * group) * size
                copy_line(q_THD, at, mask_q_NGRD[n, g], (t - mask_S[s]) * group * size, group * size)


@compiled()
def _score_masks(begin_s, end_s, group, range_4T, first_S1, mask_S, mask_q_NGRD, keys_NGDL, score_NGRL):
    """Scores of mask rows; -inf of keys that a row does not see."""
    size = mask_q_NGRD.shape[3]
    for s in range(begin_s, end_s):
        for g in range(score_NGRL.shape[1]):
            rows, n = (first_S1[s + 1] - mask_S[s]) * group, s - begin_s
            width = score_NGRL.shape[3]
            product_with_rows(mask_q_NGRD[n, g], rows, size, keys_NGDL[n, g], 0, 0, width, score_NGRL[n, g])
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
            width = attended_NGRD.shape[3]
            product_with_rows(weight_NGRL[n, g], rows, keys, values_NGLD[n, g], 0, 0, width, attended_NGRD[n, g])
            for t in range(mask_S[s], first_S1[s + 1]):
                for u in range(group):
                    copy_line(attended_NGRD[n, g, (t - mask_S[s]) * group + u], 0, out_THD[t, g * group + u], 0, size)


@dataclass(frozen=True)
class _Work:
    """The working memory of packs of one shape; arrays as in the kernels.

    Attributes:
        pieces: begin and end of the sequences computed at once, and their scores and weights.
        lines: of the clean rows of one sequence and head: its keys, then queries, float64 scores, weights and what is attended
            to, of some rows.
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
        clean = max(1, _MOST_QUERIES // self._group) * self._group
        lines = [
            take(name, *shape)
            for name, *shape in (
                ("key rows", width, self._size), ("queries", clean, self._size), ("clean scores", 2 * clean * width),
                ("clean weights and sums", clean * (width + 1)), ("attended by clean rows", clean, features),
            )
        ]  # fmt: skip
        spans = [(s, min(s + at_once, sequences)) for s in range(0, sequences, at_once)]
        scores, weights = pairs[3][0], pairs[4][0]
        pieces = [(begin, end, scores[: end - begin], weights[: end - begin]) for begin, end in spans]
        key_rows, queries, wide, *others = (array for _, array in lines)
        work = _Work(pieces, (key_rows, queries, wide.view(np.float64), *others), *(array for _, array in pairs))
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
