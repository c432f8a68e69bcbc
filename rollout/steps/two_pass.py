"""Plans of `two_pass`: the first pass runs the anchor and a mask block after it, the second pass verifies the drafts.

The first pass gives p after the anchor, and drafts that know the anchor. Waiting drafts are dropped.
"""

from __future__ import annotations

import numpy as np

from ...model.layout import DecodeRows
from ..schedule import Schedule
from ..sequence import ScheduledSample, SchedulerOutput
from .plan import ForwardRequest, StepPlan, anchors, takes_drafts


class TwoPassPlanBuilder:
    """Plans steps of one `two_pass` schedule.

    Args:
        schedule: with sizes (`Schedule.within`).
        mask_token: placeholder of rows whose token is filled in later.
    """

    def __init__(self, schedule: Schedule, mask_token: int) -> None:
        assert schedule.drafts is not None
        self._drafts = schedule.drafts
        self._first = DecodeRows([mask_token], 0, (1,), schedule.drafts)
        self._second = DecodeRows([mask_token] * schedule.drafts, 0, (), 0)
        self.passes: tuple[DecodeRows, ...] = (self._first, self._second)

    def plan(self, batch: SchedulerOutput) -> StepPlan:
        """The step that runs these samples."""
        decoding = batch.decoding
        counts = [min(max(sample.remaining - 1, 0), self._drafts) * takes_drafts(sample) for sample in decoding]
        count_D = np.array(counts, dtype=np.int64)
        anchor_D, token_D = anchors(decoding)
        forward = ForwardRequest(
            batch, self._first, anchor_D, token_D, np.ones(len(decoding), np.int64), count_D > 0, np.arange(len(decoding)),
            [np.array(anchor_D, np.int64), np.array(token_D, np.int64)],
        )  # fmt: skip
        verify_D = count_D.nonzero()[0]
        return StepPlan(
            batch, forward, count_D,
            block_start_D=[anchor + 1 if count else -1 for anchor, count in zip(anchor_D, counts)],
            block_length_D=[self._drafts if count else 0 for count in counts],
            verify_forward=self._verify_forward(batch, count_D, verify_D) if len(verify_D) else None,
            verify_D=verify_D if len(verify_D) else None,
            forwards=2,
        )  # fmt: skip

    def _verify_forward(self, batch: SchedulerOutput, count_D: np.ndarray, verify_D: np.ndarray) -> ForwardRequest:
        samples = [batch.decoding[d] for d in verify_D.tolist()]
        if batch.prefills or len(samples) < len(batch.scheduled):
            batch = SchedulerOutput.of([ScheduledSample(sample, 0, True) for sample in samples])
        return ForwardRequest(
            batch, self._second, [sample.anchor + 1 for sample in samples], None, count_D[verify_D],
            np.zeros(len(samples), dtype=bool), verify_D, [verify_D],
        )  # fmt: skip
