"""A decode step as data: the rows of its forward passes, the drafts it verifies, the proposals it drafts from.

Invariants:
- A plan is made before the step runs and never changes. It depends on how many drafts wait, never on which tokens they are.
- A mask block is never cut short at the end of a sample: its length would tell the draft where the sample ends.

Legend: S sequences of the step, D of them decoding, M most drafts of one sample, R clean decode rows of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol

import numpy as np
import torch

from ...model.layout import DecodeRows
from ..sequence import Sample, SchedulerOutput


class ForwardRequest(NamedTuple):
    """The rows of one forward pass.

    A sequence first runs the prompt tokens that are scheduled for it. If it decodes, its decode rows follow: clean rows, then
    mask blocks. The logits of all clean decode rows are wanted.

    Attributes:
        batch: the S sequences of the pass, in order.
        full: decode rows of a sequence that leaves nothing out. Its start is 0 and its tokens are placeholders.
        start_D: position of the first decode row.
        token_D: token of the first clean decode row; None where drafts take that row too.
        clean_D: int64, clean decode rows, at most those of `full`. All but the row of `token_D` hold drafts.
        proposes_D: bool, whether the sequence runs the mask blocks of `full`: those whose parent is one of its clean rows.
        draft_row_D: int64, which row of the step's drafts the sequence takes its drafts from.
        extra: int64 arrays uploaded in the same host-to-device copy.
    """

    batch: SchedulerOutput
    full: DecodeRows
    start_D: list[int]
    token_D: list[int] | None
    clean_D: np.ndarray
    proposes_D: np.ndarray
    draft_row_D: np.ndarray
    extra: list[np.ndarray]

    @property
    def first_draft(self) -> int:
        """The clean decode row that holds a sequence's first draft."""
        return 0 if self.token_D is None else 1

    @property
    def width(self) -> int:
        """R, the most clean decode rows of a sequence."""
        return int(self.clean_D.max(initial=1))

    def rows(self, drafts: Sequence[Sequence[int]] | None = None) -> list[DecodeRows]:
        """The rows of each of the S sequences, prompt tokens included.

        Args:
            drafts: the step's drafts, where the host knows them. Without them their rows hold placeholders.
        """
        decode_rows = iter(self._decode_rows(drafts))
        rows = []
        for sample, chunk, decodes in self.batch.scheduled:
            own = next(decode_rows) if decodes else DecodeRows((), sample.cached + chunk, (), 0)
            rows.append(own.behind(sample.tokens[sample.cached : sample.cached + chunk]) if chunk else own)
        return rows

    def _decode_rows(self, drafts: Sequence[Sequence[int]] | None) -> list[DecodeRows]:
        full, first, rows = self.full, self.first_draft, []
        for d, (start, clean, proposes, draft_row) in enumerate(
            zip(self.start_D, self.clean_D.tolist(), self.proposes_D.tolist(), self.draft_row_D.tolist(), strict=True)
        ):
            placed = full.clean[first:clean] if drafts is None else drafts[draft_row][: clean - first]
            tokens = [*placed] if self.token_D is None else [self.token_D[d], *placed]
            offsets = tuple(offset for offset in full.proposals if offset <= clean) if proposes else ()
            rows.append(DecodeRows(tokens, start, offsets, full.block_length if offsets else 0))
        return rows


class NextDrafts(NamedTuple):
    """Where the drafts of the next step are drawn from, for each of D samples.

    Attributes:
        mask_row_D: int64, the mask row that predicts the first draft, counted from the sequence's first mask row.
        count_D: int64, how many drafts.
        level_D: int64, level of the proposal they come from.
    """

    mask_row_D: np.ndarray
    count_D: np.ndarray
    level_D: np.ndarray


@dataclass(frozen=True, slots=True)
class Proposals:
    """The proposals of a `fused` step: one mask block per level, each drafted as if `level` drafts had been accepted.

    Attributes:
        level_L: int64, ascending, 0 among them.
        block: mask rows of each proposal.
        drafts: most drafts that the next step verifies.
        proposes_D: bool, whether the sample drafts at all.
        remaining_D: int64, tokens the sample may still generate before the step.
    """

    level_L: np.ndarray
    block: int
    drafts: int
    proposes_D: np.ndarray
    remaining_D: np.ndarray

    def select(self, accepted_D: np.ndarray) -> NextDrafts:
        """The next drafts, given how many drafts of each sample were accepted: from the highest level not above that number.

        Slot 0 of a proposal stands for the token after `level` accepted drafts. The token that verification sampled stands
        `accepted - level` places further, and the next drafts follow it.
        """
        reached_D = np.searchsorted(self.level_L, accepted_D, side="right") - 1
        skip_D = accepted_D - self.level_L[reached_D] + 1
        goes_on_D = self.proposes_D & (self.remaining_D > accepted_D + 2)
        count_D = np.where(goes_on_D, np.clip(self.block - skip_D, 0, self.drafts), 0)
        return NextDrafts(reached_D * self.block + skip_D, count_D, self.level_L[reached_D])


def select_on_device(
    level_L: torch.Tensor, block: int, drafts: int, proposes_S: torch.Tensor, remaining_S: torch.Tensor, accepted_S: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mask_row_S, count_S) of `Proposals.select`, of device tensors and without the host."""
    reached_S = torch.searchsorted(level_L, accepted_S, right=True) - 1
    skip_S = accepted_S - level_L[reached_S] + 1
    goes_on_S = proposes_S & (remaining_S > accepted_S + 2)
    count_S = torch.where(goes_on_S, (block - skip_S).clamp(0, drafts), 0)
    return reached_S * block + skip_S, count_S


class StepPlan(NamedTuple):
    """One decode step.

    Attributes:
        batch: the samples of the step.
        forward: its first forward pass; it takes all prompt rows.
        count_D: int64, drafts that are verified.
        block_start_D, block_length_D: first position and length of the mask block those drafts come from; -1 and 0 where
            no draft is verified.
        verify_forward: the second forward pass of `two_pass`, over the samples that have drafts. The drafts are drawn from the
            mask rows of `forward` and verified here. None: drafts of the step before are verified by `forward`.
        verify_D: int64, those samples, as indices of D. None where `verify_forward` is.
        proposals: what the next step's drafts are drawn from; None where the step proposes nothing.
        forwards: forward passes that the step counts as.
    """

    batch: SchedulerOutput
    forward: ForwardRequest
    count_D: np.ndarray
    block_start_D: list[int]
    block_length_D: list[int]
    verify_forward: ForwardRequest | None = None
    verify_D: np.ndarray | None = None
    proposals: Proposals | None = None
    forwards: int = 1


class PlanBuilder(Protocol):
    """Plans the steps of one schedule.

    Attributes:
        passes: decode rows of a sequence that leaves nothing out, of each forward pass (`ForwardRequest.full`).
    """

    passes: tuple[DecodeRows, ...]

    def plan(self, batch: SchedulerOutput) -> StepPlan:
        """The step that runs these samples."""


def anchors(decoding: Sequence[Sample]) -> tuple[list[int], list[int]]:
    """Position and token of each sample's anchor."""
    tokens = [sample.tokens for sample in decoding]
    return [len(each) - 1 for each in tokens], [each[-1] for each in tokens]


@cache
def numbers_up_to(count: int) -> np.ndarray:
    """0 .. count - 1, int64. Plans share the array and do not write to it."""
    return np.arange(count)


@cache
def ones(count: int) -> np.ndarray:
    """Int64, shared likewise."""
    return np.ones(count, dtype=np.int64)


@cache
def answers(count: int, answer: bool) -> np.ndarray:
    """The same answer for each, shared likewise."""
    return np.full(count, answer)
