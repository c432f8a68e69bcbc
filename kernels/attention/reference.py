"""Plain attention through torch's scaled-dot-product op.

Legend: S sequences, R rows, L cached positions, K keys (in a pool: its positions), H heads, G key heads, D head size, T rows
of the pack.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .rows import Rows


def score_dtype(q: torch.Tensor) -> torch.dtype:
    """The dtype that `attend` computes scores and weights in. On a CPU that is float64 for float32: a float32 score of 16 is
    rounded by up to 1e-6, and so is its weight, while all other roundings are relative ones of 6e-8."""
    return torch.float64 if q.dtype == torch.float32 and q.device.type == "cpu" else q.dtype


def attend(
    q_SRHD: torch.Tensor, k_SKGD: torch.Tensor, v_SKGD: torch.Tensor, visible_SRK: torch.Tensor, scale: float
) -> torch.Tensor:
    """Returns out_SRHD. A row that sees nothing (padding) has no defined value; callers drop it.

    Args:
        visible_SRK: bool, or already as what is added to the scores (0 or -inf), in the dtype that `score_dtype` gives.
    """
    dtype = score_dtype(q_SRHD)
    q_SHRD, k_SGKD, v_SGKD = (x.transpose(1, 2).to(dtype) for x in (q_SRHD, k_SKGD, v_SKGD))
    out_SHRD = F.scaled_dot_product_attention(
        q_SHRD, k_SGKD, v_SGKD, attn_mask=visible_SRK[:, None], scale=scale, enable_gqa=q_SHRD.shape[1] != k_SGKD.shape[1]
    )
    return out_SHRD.transpose(1, 2).to(q_SRHD.dtype)


def paged_attend(
    q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor, k_pool_KGD: torch.Tensor, v_pool_KGD: torch.Tensor,
    rows: Rows, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Returns out_THD; a row that sees nothing gives 0.

    Args:
        q_THD, k_TGD, v_TGD: the pack; heads contiguous, any stride between rows.
        k_pool_KGD, v_pool_KGD: one layer's pool of K = pages * page_size positions, contiguous, on the same device. Read
            only below each sequence's `start_S`; the pack's own keys come from k_TGD and v_TGD.
        rows: who sees what.

    In Triton this is one or two launches, without gradients. Nothing is read back from the device, so the call can be captured.
    Here one sequence is computed after another: its cached positions are gathered, and its own rows stand behind them.
    """
    out_THD = torch.zeros_like(q_THD)
    first = rows.first_S1.tolist()
    for s, start in enumerate(rows.start_S.tolist()):
        own = slice(first[s], first[s + 1])
        past = torch.arange(start, device=q_THD.device)
        place = rows.table_SP[s].long()[past // rows.page_size] * rows.page_size + past % rows.page_size
        fresh = torch.arange(own.stop - own.start, device=q_THD.device)
        (past_begin, past_end), (clean_begin, clean_end), (block_begin, block_end) = (
            rows.range_6T[:, own, None].long().unflatten(0, (3, 2))
        )
        sees_RK = torch.cat(
            [
                (past >= past_begin) & (past < past_end),
                (fresh >= clean_begin) & (fresh < clean_end) | (fresh >= block_begin) & (fresh < block_end),
            ],
            dim=1,
        )
        some = sees_RK.any(1)
        k, v = (
            torch.cat([pool[place], x[own]])[None] for pool, x in ((k_pool_KGD, k_TGD), (v_pool_KGD, v_TGD))
        )
        out_RHD = attend(q_THD[own][some][None], k, v, sees_RK[some][None], scale)[0]
        out_THD[own] = out_THD[own].index_copy(0, some.nonzero()[:, 0], out_RHD)
    return out_THD
