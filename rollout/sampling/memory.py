"""What the steps of a CPU write, in memory that is made once for each size: where steps are small, a new tensor takes as long as
what is computed into it.

Legend: T rows, S sequences, M most drafts, R = M + 1 verify rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ...kernels.dispatch import compiled_where_installed, takes_numba
from ...kernels.verify import Rejection
from .drafts import Drafts

_MOST_SIZES = 256
"""Sizes whose memory is kept."""


class _Drafting(NamedTuple):
    """What is written before drafts are drawn: the drafts' hidden states and counts, also as arrays."""

    hidden_SMH: torch.Tensor
    drafts: Drafts
    rows: np.ndarray
    counts: np.ndarray


class StepMemory:
    """Everything is valid until it is asked for again with the same sizes."""

    def __init__(self) -> None:
        self._drafting: dict[tuple[int, int, int, int], _Drafting] = {}
        self._logits = torch.zeros(0)
        self._verdicts: dict[tuple[int, int], tuple[Rejection, torch.Tensor]] = {}

    @staticmethod
    def serves(x: torch.Tensor) -> bool:
        """Whether what is made of such a tensor may lie here."""
        return x.dtype == torch.float32 and takes_numba(x)

    def drafting(
        self, hidden_TH: torch.Tensor, first_S: np.ndarray, count_S: np.ndarray, vocabulary: int
    ) -> tuple[torch.Tensor, Drafts]:
        """What M drafts of each sequence are drawn from, and drafts with these counts, whose other tensors are to be written.

        Args:
            count_S: int64. first_S: int64, row of each sequence's first draft. The last row stands for those behind it.

        All sizes share the memory of logits.
        """
        size = len(first_S), max(count_S.tolist()), hidden_TH.shape[1], vocabulary
        found = self._drafting.get(size)
        if found is None:
            found = self._drafting[size] = self._made(*size)
        compiled_where_installed(_take_rows)(hidden_TH.numpy(), first_S, found.rows)
        found.counts[:] = count_S
        return found.hidden_SMH, found.drafts

    def _made(self, s: int, m: int, h: int, v: int) -> _Drafting:
        if len(self._logits) < s * m * v or len(self._drafting) >= _MOST_SIZES:
            self._drafting.clear()
            self._logits = torch.zeros(max(len(self._logits), s * m * v))
        hidden_SMH, count_S = torch.zeros(s, m, h), torch.zeros(s, dtype=torch.int64)
        token_SM, lse_SM = torch.zeros((s, m), dtype=torch.int64), torch.zeros((s, m), dtype=torch.float64)
        drafts = Drafts(token_SM, count_S, q_logits_SMV=self._logits[: s * m * v].view(s, m, v), q_lse_SM=lse_SM)
        return _Drafting(hidden_SMH, drafts, hidden_SMH.numpy(), count_S.numpy())

    def verdict(self, sequences: int, rows: int) -> tuple[Rejection, torch.Tensor]:
        """A result to be written, and zeros of the shape of its logarithms."""
        found = self._verdicts.get((sequences, rows))
        if found is None:
            if len(self._verdicts) >= _MOST_SIZES:
                self._verdicts.clear()
            found = self._verdicts[sequences, rows] = Rejection.empty(sequences, rows), torch.zeros(sequences, rows)
        return found


def _take_rows(hidden_TH, first_S, out_SMH):
    """Writes the last array."""
    for s in range(out_SMH.shape[0]):
        for m in range(out_SMH.shape[1]):
            out_SMH[s, m] = hidden_TH[min(first_S[s] + m, hidden_TH.shape[0] - 1)]
