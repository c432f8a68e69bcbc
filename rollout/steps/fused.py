"""Plans of `fused`: one forward pass verifies the waiting drafts and proposes the next ones.

A sample runs its anchor, its waiting drafts, and one mask block per level that its drafts can reach.
"""

from __future__ import annotations

import numpy as np

from ...model.layout import DecodeRows
from ..schedule import Schedule
from ..sequence import SchedulerOutput
from .plan import ForwardRequest, Proposals, StepPlan, anchors, numbers_up_to


class FusedPlanBuilder:
    """Plans steps of one `fused` schedule.

    Args:
        schedule: with sizes (`Schedule.within`).
        mask_token: placeholder of rows whose token is filled in later.
    """

    def __init__(self, schedule: Schedule, mask_token: int) -> None:
        assert schedule.drafts is not None and schedule.block is not None
        self._drafts, self._block, self._level_L = schedule.drafts, schedule.block, np.array(schedule.levels)
        offsets = tuple(level + 1 for level in schedule.levels)
        self._full = DecodeRows([mask_token] * (1 + schedule.drafts), 0, offsets, schedule.block)
        self.passes: tuple[DecodeRows, ...] = (self._full,)

    def plan(self, batch: SchedulerOutput) -> StepPlan:
        """The step that runs these samples. Of each sample's waiting drafts the first ones are verified, as many as the schedule
        takes; the others are dropped."""
        decoding, most = batch.decoding, self._drafts
        remaining = [sample.limit - len(sample.tokens) for sample in decoding]
        waiting_D = np.array([0 if sample.drafts is None else sample.draft_count for sample in decoding], dtype=np.int64)
        remaining_D = np.array(remaining, dtype=np.int64)
        count_D = np.minimum(waiting_D, (remaining_D - 1).clip(0, most))
        counts = count_D.tolist()
        proposes_D = np.array([sample.takes_drafts for sample in decoding], dtype=bool) & (remaining_D > 1)
        anchor_D, token_D = anchors(decoding)
        forward = ForwardRequest(
            batch, self._full, anchor_D, token_D, count_D + 1, proposes_D, numbers_up_to(len(decoding)),
            [np.array(anchor_D, np.int64)],
        )  # fmt: skip
        return StepPlan(
            batch, forward, count_D,
            block_start_D=[s.draft_start if count else -1 for s, count in zip(decoding, counts)],
            block_length_D=[s.draft_length if count else 0 for s, count in zip(decoding, counts)],
            proposals=Proposals(self._level_L, self._block, self._drafts, proposes_D, remaining_D),
        )  # fmt: skip
