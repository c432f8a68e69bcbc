"""Plans of `ar`: each decoding sample runs its anchor and commits one token. Waiting drafts are dropped."""

from __future__ import annotations

import numpy as np

from ...model.layout import DecodeRows
from ..sequence import SchedulerOutput
from .plan import ForwardRequest, StepPlan, anchors, answers, numbers_up_to, ones


class ArPlanBuilder:
    """Plans steps of `ar`.

    Args:
        mask_token: placeholder of rows whose token is filled in later.
    """

    def __init__(self, mask_token: int) -> None:
        self._full = DecodeRows([mask_token], 0, (), 0)
        self.passes: tuple[DecodeRows, ...] = (self._full,)

    def plan(self, batch: SchedulerOutput) -> StepPlan:
        """The step that runs these samples."""
        count = len(batch.decoding)
        none_D, (anchor_D, token_D) = np.zeros(count, dtype=np.int64), anchors(batch.decoding)
        forward = ForwardRequest(
            batch, self._full, anchor_D, token_D, ones(count), answers(count, False), numbers_up_to(count),
            [np.array(anchor_D, np.int64)],
        )  # fmt: skip
        return StepPlan(batch, forward, none_D, [-1] * count, [0] * count)
