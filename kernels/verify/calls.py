"""Calls of the functions of `numba` as numbers: sizes, and addresses of tensors. A call may be made before its tensors hold
anything, kept, and passed through other functions that numba compiles.

Legend: as in `numba`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..addresses import flat
from .reference import Rejection


class Chain(NamedTuple):
    """One `draft_chain`. Where the first slot's logits are known, those of the sequences lie `first_stride` numbers apart."""

    sequences: int
    slots: int
    vocabulary: int
    logits_at: int
    pair_at: int
    known: bool
    first_at: int
    first_stride: int
    first_scale: float
    previous_at: int
    count_at: int
    seed_at: int
    anchor_at: int
    temperature_at: int
    token_at: int
    lse_at: int
    excluded: int
    purpose: int

    @classmethod
    def of(
        cls, logits_SMV: torch.Tensor, pair_VV: torch.Tensor, previous_S: torch.Tensor, count_S: torch.Tensor,
        temperature_S: torch.Tensor, seed_S: torch.Tensor, anchor_S: torch.Tensor, excluded: int, purpose: int,
        first_SRV: torch.Tensor | None, first_scale: float, into: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[Chain, list[torch.Tensor]]:  # fmt: skip
        """The call, and what must be held until it has ended. The numbers in the tensors may still change."""
        assert logits_SMV.dtype == torch.float32 and logits_SMV.is_contiguous()
        (s, m, v), first, stride = logits_SMV.shape, None, 0
        if first_SRV is not None:
            lies = first_SRV.dtype == torch.float32 and first_SRV.stride(2) == 1
            first = first_SRV if lies else flat(torch.float32, first_SRV)[0]
            stride = first.stride(0)
        (pairs,), (temperature,) = flat(torch.float32, pair_VV), flat(torch.float64, temperature_S)
        previous, count, seed, anchor = flat(torch.int64, previous_S, count_S, seed_S, anchor_S)
        made = cls(
            s, m, v, logits_SMV.data_ptr(), pairs.data_ptr(), first is not None, 0 if first is None else first.data_ptr(), stride,
            first_scale, previous.data_ptr(), count.data_ptr(), seed.data_ptr(), anchor.data_ptr(), temperature.data_ptr(),
            into[0].data_ptr(), into[1].data_ptr(), excluded, int(purpose),
        )  # fmt: skip
        held = [logits_SMV, pairs, temperature, previous, count, seed, anchor, *into]
        return made, held if first is None else [*held, first]


NO_CHAIN = Chain(0, 0, 0, 0, 0, False, 0, 0, 0.0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


class Verification(NamedTuple):
    """One `verify_rejection`."""

    sequences: int
    rows: int
    vocabulary: int
    p_at: int
    q_at: int
    draft_at: int
    count_at: int
    seed_at: int
    anchor_at: int
    q_lse_at: int
    temperature_at: int
    draft_temperature_at: int
    mix_at: int
    accepted_at: int
    token_at: int
    logprob_at: int
    behavior_at: int
    excluded: int
    mixed: bool

    @classmethod
    def of(
        cls, p_logits_SRV: torch.Tensor, q_logits_SMV: torch.Tensor, q_lse_SM: torch.Tensor, draft_SM: torch.Tensor,
        count_S: torch.Tensor, temperature_S: torch.Tensor, seed_S: torch.Tensor, anchor_S: torch.Tensor, excluded: int,
        mix_weight_S: torch.Tensor | None, draft_temperature_S: torch.Tensor | None, into: Rejection,
    ) -> tuple[Verification, list[torch.Tensor]]:  # fmt: skip
        """As `Chain.of`."""
        s, r, v = p_logits_SRV.shape
        assert draft_SM.shape[1] == r - 1
        drawn_S = temperature_S if draft_temperature_S is None else draft_temperature_S
        p, q = flat(torch.float32, p_logits_SRV, q_logits_SMV)
        draft, count, seed, anchor = flat(torch.int64, draft_SM, count_S, seed_S, anchor_S)
        mixed = mix_weight_S is not None
        q_lse, temperature, drawn, mix = flat(
            torch.float64, q_lse_SM, temperature_S, drawn_S, temperature_S if mix_weight_S is None else mix_weight_S
        )  # fmt: skip
        made = cls(
            s, r, v, p.data_ptr(), q.data_ptr(), draft.data_ptr(), count.data_ptr(), seed.data_ptr(), anchor.data_ptr(),
            q_lse.data_ptr(), temperature.data_ptr(), drawn.data_ptr(), mix.data_ptr(), into.accepted_S.data_ptr(),
            into.token_SR.data_ptr(), into.logprob_SR.data_ptr(), into.behavior_logprob_SR.data_ptr(), excluded, mixed,
        )  # fmt: skip
        return made, [p, q, draft, count, seed, anchor, q_lse, temperature, drawn, mix, *into]


NO_VERIFICATION = Verification(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, False)
