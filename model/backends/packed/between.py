"""What happens between and behind the two passes of `PackedBackend.forward_twice`: logits of rows, and drafts that become the
tokens of the second pass. numba compiles it, so that both passes are one call.

Legend: as in `DraftsBetween`; T rows of both passes, S sequences of both, H hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ....kernels.addresses import floats, integers
from ....kernels.compiled import compiled
from ....kernels.lanes import copy_line
from ....kernels.verify.calls import NO_CHAIN, NO_VERIFICATION, Chain, Verification

if TYPE_CHECKING:
    from .. import DraftsBetween


class Between(NamedTuple):
    """`DraftsBetween` with addresses in the place of its tensors. Without samples there is no second pass."""

    sequences: int
    anchor_D: np.ndarray
    verify_K: np.ndarray
    hidden_at: int
    drawn_at: int
    logits_at: int
    draws: Chain
    verifies: Verification

    @classmethod
    def of(cls, drafts: DraftsBetween) -> Between:
        """Its tensors must be held while this is used."""
        sequences, anchor_D, verify_K, hidden_NH, drawn_NV, logits_DRV, draws, verifies = drafts
        memory = hidden_NH.data_ptr(), drawn_NV.data_ptr(), logits_DRV.data_ptr()
        return cls(sequences, anchor_D, verify_K, *memory, draws, NO_VERIFICATION if verifies is None else verifies)


_NO_ROWS = np.empty(0, np.int64)
NOTHING_BETWEEN = Between(0, _NO_ROWS, _NO_ROWS, 0, 0, 0, NO_CHAIN, NO_VERIFICATION)


@compiled()
def _take(hidden_TH, first, count, out_NH, to):
    """Copies `count` rows. The last row stands for those behind it."""
    size, last = hidden_TH.shape[1], hidden_TH.shape[0] - 1
    for m in range(count):
        copy_line(hidden_TH, min(first + m, last) * size, out_NH, (to + m) * size, size)


@compiled()
def _memory(between, size, logits_at):
    """Where hidden states of D (M + 1) rows and their logits go."""
    rows = between.draws.sequences * (between.draws.slots + 1)
    return floats(between.hidden_at, (rows, size)), floats(logits_at, (rows, between.draws.vocabulary))


@compiled()
def rows_to_draft_from(between, hidden_TH):
    """The hidden states of the anchors and of the rows that drafts are drawn from, and where their logits go."""
    hidden_NH, logits_NV = _memory(between, hidden_TH.shape[1], between.drawn_at)
    count, slots = between.draws.sequences, between.draws.slots
    for d in range(count):
        _take(hidden_TH, between.anchor_D[d], 1, hidden_NH, d)
        _take(hidden_TH, between.anchor_D[d] + 1, slots, hidden_NH, count + d * slots)
    return hidden_NH, logits_NV


@compiled()
def rows_to_verify(between, hidden_TH, first_S1):
    """The hidden states of each anchor and of the drafts after it, and where their logits go."""
    hidden_NH, logits_NV = _memory(between, hidden_TH.shape[1], between.logits_at)
    rows = between.draws.slots + 1
    for d in range(between.draws.sequences):
        _take(hidden_TH, between.anchor_D[d], 1, hidden_NH, d * rows)
    for k, d in enumerate(between.verify_K):
        _take(hidden_TH, first_S1[between.sequences + k], rows - 1, hidden_NH, d * rows + 1)
    return hidden_NH, logits_NV


@compiled()
def put_drafts(between, first_S1, token_T):
    """The drafts become the tokens of the second pass."""
    draws = between.draws
    token_DM, count_D = integers(draws.token_at, (draws.sequences, draws.slots)), integers(draws.count_at, draws.sequences)
    for k, d in enumerate(between.verify_K):
        t = first_S1[between.sequences + k]
        for m in range(count_D[d]):
            token_T[t + m] = token_DM[d, m]
