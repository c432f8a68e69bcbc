"""Plans of `two_pass`: the first pass runs the anchor and a mask block after it, the second pass verifies the drafts.

The first pass gives p after the anchor, and drafts that know the anchor. Waiting drafts are dropped.
"""

from __future__ import annotations

import numpy as np

from ...model.layout import DecodeRows
from ..schedule import Schedule
from ..sequence import SchedulerOutput
from .plan import ForwardRequest, StepPlan, answers, numbers_up_to, ones


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
        decoding, most = batch.decoding, self._drafts
        anchor_D, token_D, counts = [], [], []
        for sample in decoding:
            tokens = sample.tokens
            anchor = len(tokens) - 1
            anchor_D.append(anchor)
            token_D.append(tokens[-1])
            left = sample.limit - anchor - 2  # tokens it may generate, less the one that no draft gives
            counts.append((most if most < left else left) if sample.takes_drafts and left > 0 else 0)
        numbers_3D = np.array([counts, anchor_D, token_D], dtype=np.int64)
        count, count_D = len(decoding), numbers_3D[0]
        index_D, proposes_D = numbers_up_to(count), answers(count, True)
        verify_D = index_D
        if 0 in counts:
            proposes_D, verify_D = count_D > 0, count_D.nonzero()[0]
        forward = ForwardRequest(
            batch, self._first, anchor_D, token_D, ones(count), proposes_D, index_D, [numbers_3D[1], numbers_3D[2]]
        )
        verified = len(verify_D) > 0
        return StepPlan(
            batch, forward, count_D,
            [anchor + 1 if count else -1 for anchor, count in zip(anchor_D, counts)],
            [most if count else 0 for count in counts],
            self._verify_forward(forward, count_D, verify_D) if verified else None,
            verify_D if verified else None,
            forwards=2,
        )  # fmt: skip

    def _verify_forward(self, first: ForwardRequest, count_D: np.ndarray, verify_D: np.ndarray) -> ForwardRequest:
        batch, start_D = first.batch, [anchor + 1 for anchor in first.start_D]
        if len(verify_D) < len(start_D):
            batch = batch.alone(verify_D.tolist())
            start_D = [start_D[d] for d in verify_D.tolist()]
            count_D = count_D[verify_D]
        elif batch.prefills or len(start_D) < len(batch.scheduled):
            batch = batch.alone(range(len(start_D)))
        none_D = answers(len(start_D), False)
        return ForwardRequest(batch, self._second, start_D, None, count_D, none_D, verify_D, [verify_D])
