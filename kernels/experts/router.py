"""EDA router in Triton, in two launches; torch needs about twenty.

Invariants:
- One program's rows share nothing: a row's choice never depends on the other rows. Under `batch_invariant` the tiles do not
  depend on their number either.
- Values round to the policy's dtype where the reference rounds them, so that a near tie between experts falls as it does
  there.

Legend: T rows, D hidden, P router width, E experts, C = E + 1 classes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..dispatch import batch_invariant
from ..launch import launch, pipeline, precision
from ..products import tile_product
from .reference import RouterWeights
from .tiles import Tile


@triton.jit(do_not_specialize=["rows"])
def _state_kernel(
    x_TD, state_TP, weight_PD, bias_P, scale_P, out_TP, rows, D: tl.constexpr, P: tl.constexpr, STATE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """down_proj, and the router state of the layer below: out = W x + b (+ state * scale)."""
    dtype = out_TP.dtype.element_ty
    m = tl.program_id(0) * M + tl.arange(0, M)
    n = tl.program_id(1) * N + tl.arange(0, N)
    real, ok = m < rows, n < P
    x_at = x_TD + tl.where(real, m, 0).to(tl.int64)[:, None] * D
    w_at = weight_PD + tl.where(ok, n, 0)[None, :] * D
    acc = tile_product(x_at, w_at, D, M, N, K, PRECISION)
    out = (acc + tl.load(bias_P + n, ok, 0).to(tl.float32)[None, :]).to(dtype)
    at = m.to(tl.int64)[:, None] * P + n[None, :]
    inside = real[:, None] & ok[None, :]
    if STATE:
        carried = tl.load(state_TP + at, inside, 0).to(tl.float32) * tl.load(scale_P + n, ok, 0).to(tl.float32)[None, :]
        out = (out.to(tl.float32) + carried.to(dtype).to(tl.float32)).to(dtype)
    tl.store(out_TP + at, out, inside)


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit(do_not_specialize=["rows"])
def _choice_kernel(
    hidden_TP, norm_P, fc1_PP, fc1_bias_P, fc2_PP, fc2_bias_P, out_CP, balance_C, expert_T, weight_T, probs_TC, rows, eps,
    P: tl.constexpr, C: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, CLASSES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Norm, the three-layer MLP, softmax and the choice. The first layer is made N features at a time, each of which goes
    into the second layer's sums at once, so that no weight matrix has to be held whole."""
    dtype = hidden_TP.dtype.element_ty
    m = tl.program_id(0) * M + tl.arange(0, M)
    p = tl.arange(0, WIDTH)
    real, ok = m < rows, p < P
    row = tl.where(real, m, 0).to(tl.int64)
    x = tl.load(hidden_TP + row[:, None] * P + p[None, :], mask=ok[None, :], other=0.0).to(tl.float32)
    x = x / tl.sqrt(tl.sum(x * x, 1) / P + eps)[:, None]
    weight = tl.load(norm_P + p, ok, 0).to(tl.float32)
    x = (x.to(dtype).to(tl.float32) * weight[None, :]).to(dtype)

    acc = tl.zeros((M, WIDTH), tl.float32)
    for start in range(0, P, N):
        n = start + tl.arange(0, N)
        n_ok = n < P
        w1 = tl.load(fc1_PP + n[None, :] * P + p[:, None], mask=n_ok[None, :] & ok[:, None], other=0.0)
        first = tl.dot(x, w1, input_precision=PRECISION) + tl.load(fc1_bias_P + n, n_ok, 0).to(tl.float32)[None, :]
        first = _gelu(first.to(dtype).to(tl.float32)).to(dtype)
        w2 = tl.load(fc2_PP + p[None, :] * P + n[:, None], mask=n_ok[:, None] & ok[None, :], other=0.0)
        acc = tl.dot(first, w2, acc, input_precision=PRECISION)
    acc += tl.load(fc2_bias_P + p, ok, 0).to(tl.float32)[None, :]
    second = _gelu(acc.to(dtype).to(tl.float32)).to(dtype)

    c = tl.arange(0, CLASSES)
    c_ok = c < C
    w3 = tl.load(out_CP + c[None, :] * P + p[:, None], mask=c_ok[None, :] & ok[:, None], other=0.0)
    logits = tl.dot(second, w3, input_precision=PRECISION).to(dtype).to(tl.float32)
    logits = tl.where(c_ok[None, :], logits, float("-inf"))
    probs = tl.exp(logits - tl.max(logits, 1)[:, None])
    probs = (probs / tl.sum(probs, 1)[:, None]).to(dtype)
    score = (probs.to(tl.float32) + tl.load(balance_C + c, c_ok, 0).to(tl.float32)[None, :])
    score = score.to(balance_C.dtype.element_ty).to(tl.float32)
    expert = tl.argmax(tl.where(c_ok[None, :], score, float("-inf")), 1)
    chosen = tl.sum(tl.where(c[None, :] == expert[:, None], probs.to(tl.float32), 0.0), 1)
    tl.store(expert_T + m, expert.to(tl.int64), real)
    tl.store(weight_T + m, chosen.to(dtype), real)
    tl.store(probs_TC + m.to(tl.int64)[:, None] * C + c[None, :], probs, real[:, None] & c_ok[None, :])


def _state_tile(rows: int, dtype: torch.dtype) -> Tile:
    narrow = 1 if dtype.itemsize == 2 else 2
    if rows <= 1024 or batch_invariant():
        return Tile(16, 16, 256 // narrow, 4, pipeline(3))
    return Tile(64, 64, 64 // narrow, 4, pipeline(3))


def route(
    x_TD: torch.Tensor, state_TP: torch.Tensor | None, weights: RouterWeights, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the reference."""
    rows, d = x_TD.shape
    p, classes = len(weights.down_proj_bias), len(weights.balancing_biases)
    x_TD, device, dtype = x_TD.contiguous(), x_TD.device, x_TD.dtype
    scale = weights.router_states_scale
    hidden_TP = torch.empty(rows, p, dtype=dtype, device=device)
    if state_TP is None or scale is None:
        state_TP = scale = None
    tile = _state_tile(rows, dtype)
    launch(
        _state_kernel, (triton.cdiv(rows, tile.m), triton.cdiv(p, tile.n)), warps=tile.warps, stages=tile.stages,
        dot_rows=tile.m, x_TD=x_TD, state_TP=hidden_TP if state_TP is None else state_TP.contiguous(),
        weight_PD=weights.down_proj_weight, bias_P=weights.down_proj_bias, scale_P=hidden_TP if scale is None else scale,
        out_TP=hidden_TP, rows=rows, D=d, P=p, STATE=state_TP is not None,
        M=tile.m, N=tile.n, K=tile.k, PRECISION=precision(dtype),
    )  # fmt: skip
    expert_T = torch.empty(rows, dtype=torch.int64, device=device)
    weight_T = torch.empty(rows, dtype=dtype, device=device)
    probs_TC = torch.empty(rows, classes, dtype=dtype, device=device)
    launch(
        _choice_kernel, (triton.cdiv(rows, 16),), warps=4, stages=pipeline(3), dot_rows=16, hidden_TP=hidden_TP,
        norm_P=weights.norm_weight, fc1_PP=weights.fc1_weight, fc1_bias_P=weights.fc1_bias, fc2_PP=weights.fc2_weight,
        fc2_bias_P=weights.fc2_bias, out_CP=weights.out_proj_weight, balance_C=weights.balancing_biases,
        expert_T=expert_T, weight_T=weight_T, probs_TC=probs_TC, rows=rows, eps=eps, P=p, C=classes, M=16, N=32,
        WIDTH=max(16, triton.next_power_of_2(p)), CLASSES=max(16, triton.next_power_of_2(classes)),
        PRECISION=precision(dtype),
    )  # fmt: skip
    return expert_T, weight_T, hidden_TP, probs_TC
