"""Drafts of a step of two passes, drawn between them, and their verification behind them, on a CPU: calls of what numba
compiled, in memory that is made once for each size. Where steps are small, a new tensor takes as long as what is written to it.

Invariant: tokens and numbers are those of `sampler.draft` and `sampler.verify`.

Legend: D samples, M most drafts of one of them, R = M + 1 verify rows, N = D R rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ...kernels.dispatch import takes_numba
from ...kernels.philox import Purpose
from ...kernels.verify import Rejection
from . import kernels
from .drafts import Drafts, SamplerRows, Verdict

if TYPE_CHECKING:
    from ...kernels.verify.calls import Chain, Verification

_MOST_SIZES = 256
"""Sizes whose memory is kept."""


class _Calls(NamedTuple):
    """The calls, of what they are, and the tensors whose addresses they hold."""

    chain: Chain
    verification: Verification | None
    rows: SamplerRows
    pair_VV: torch.Tensor
    held: list[torch.Tensor]


@dataclass(slots=True)
class TwoPasses:
    """What one step reads and writes; valid until the next step of the same sizes.

    Attributes:
        keys_4D: int64, to be written: how many drafts, position and token of the anchor, and seed of each sample.
        hidden_NH, drawn_NV, logits_DRV: as in `DraftsBetween`.
        drafts: with these counts; their q is a part of drawn_NV.
        verdict: where the verification of `calls` goes.
    """

    keys_4D: np.ndarray
    hidden_NH: torch.Tensor
    drawn_NV: torch.Tensor
    logits_DRV: torch.Tensor
    drafts: Drafts
    verdict: Verdict
    _calls: _Calls | None = None

    def calls(self, rows: SamplerRows, pair_VV: torch.Tensor, mask_token: int) -> tuple[Chain, Verification | None]:
        """What draws the drafts, and what verifies them; None for the second where that is not a rejection. Only where `serves`.
        The calls are kept, for rows of the same parameters.

        Args: as of `sampler.draft`; pair_VV of `PairTable`.
        """
        known = self._calls
        if known is None or known.pair_VV is not pair_VV or known.rows.groups is not rows.groups:
            known = self._calls = self._made(rows, pair_VV, mask_token)
        return known.chain, known.verification

    def _made(self, rows: SamplerRows, pair_VV: torch.Tensor, mask_token: int) -> _Calls:
        from ...kernels.verify.calls import Chain, Verification  # numba takes a moment to import

        (group,), q, q_lse, verdict = rows.groups, self.drafts.q_logits_SMV, self.drafts.q_lse_SM, self.verdict
        assert q is not None and q_lse is not None
        count, anchor, previous, seed = map(torch.from_numpy, self.keys_4D)
        noisy, mixed = group.greedy or group.sampler == "coupled", group.sampler == "mixed"
        chain, held = Chain.of(
            q, pair_VV, previous, count, rows.draft_temperature_S, seed, anchor, mask_token,
            Purpose.NOISE if noisy else Purpose.DRAFT, None if mixed else self.drawn_NV[: len(q), None], rows.draft_temperature,
            (self.drafts.token_SM, q_lse),
        )  # fmt: skip
        if noisy:
            return _Calls(chain, None, rows, pair_VV, held)
        verification, also_held = Verification.of(
            self.logits_DRV, q, q_lse, self.drafts.token_SM, count, rows.temperature_S, seed, anchor, -1,
            rows.mix_weight_S if mixed else None, rows.draft_temperature_S,
            Rejection(verdict.accepted_S, verdict.token_SR, verdict.logprob_SR, verdict.behavior_logprob_SR),
        )  # fmt: skip
        return _Calls(chain, verification, rows, pair_VV, held + also_held)


def serves(rows: SamplerRows, like: torch.Tensor) -> bool:
    """Whether drafts of a batch whose logits are like this tensor may be drawn between two passes."""
    (group, *others) = rows.groups
    return not others and not rows.top and group.sampler != "ar" and takes_numba(like) and kernels.serves(group, like)


class TwoPassMemory:
    """`TwoPasses` by size. All share the memory of hidden states and logits.

    Args:
        hidden, vocabulary: H and V.
    """

    def __init__(self, hidden: int, vocabulary: int) -> None:
        self._hidden, self._vocabulary = hidden, vocabulary
        self._made: dict[tuple[int, int], TwoPasses] = {}
        self._memory: dict[str, torch.Tensor] = {}

    def of(self, samples: int, most: int) -> TwoPasses:
        """For at most so many drafts of each of so many samples."""
        found = self._made.get((samples, most))
        if found is None:
            if len(self._made) >= _MOST_SIZES:
                self._made.clear()
            found = self._make(samples, most)
            self._made[samples, most] = found
        return found

    def _make(self, d: int, m: int) -> TwoPasses:
        r, v, keys_4D = m + 1, self._vocabulary, torch.zeros((4, d), dtype=torch.int64)
        hidden_NH, drawn_NV = self._shared("hidden", d * r, self._hidden), self._shared("drawn", d * r, v)
        token_DM, lse_DM = torch.zeros((d, m), dtype=torch.int64), torch.zeros((d, m), dtype=torch.float64)
        verdict = Verdict(torch.zeros(d, dtype=torch.int64), torch.zeros((d, r), dtype=torch.int64), *torch.zeros(3, d, r))
        return TwoPasses(
            keys_4D.numpy(), hidden_NH, drawn_NV, self._shared("logits", d, r, v),
            Drafts(token_DM, keys_4D[0], q_logits_SMV=drawn_NV[d:].view(d, m, v), q_lse_SM=lse_DM), verdict,
        )  # fmt: skip

    def _shared(self, name: str, *shape: int) -> torch.Tensor:
        """float32 memory that all sizes have in common."""
        count, memory = math.prod(shape), self._memory.get(name)
        if memory is None or len(memory) < count:
            self._made.clear()
            memory = self._memory[name] = torch.zeros(count)
        return memory[:count].view(shape)
