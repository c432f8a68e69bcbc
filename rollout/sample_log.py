"""What a sample's steps gave: log-probabilities, versions and trace, one entry per generated token or step.

A step's record serves all its samples. A sample notes which row of it is its own, and how many tokens it took; the lists are made
when somebody reads them, or for many steps at once.

Invariant: a sample keeps at most `2 * UNSETTLED` records, which hold the numbers of its neighbours too.

Legend: D decoding samples, R most tokens of one of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .types import StepTrace

UNSETTLED = 64
"""Steps after which the lists are made."""


class StepRecord(NamedTuple):
    """One step of D samples.

    Attributes:
        drafted, accepted, start, length: one number per sample, as in `StepTrace`.
        logprob_DR, behavior_DR, support_DR: as in `Verdict`, in memory of their own.
        version: of the weights. forwards: forward passes of the step.
    """

    drafted: list[int]
    accepted: list[int]
    start: list[int]
    length: list[int]
    logprob_DR: np.ndarray
    behavior_DR: np.ndarray
    support_DR: np.ndarray
    version: int
    forwards: int


class SampleLog:
    """The log of one sample. The lists are up to date after `settle`.

    Attributes:
        logprobs, behavior, support, versions, from_draft: one entry per generated token, as in `Trajectory`.
        trace: one entry per decode step.
    """

    __slots__ = ("_taken", "behavior", "from_draft", "logprobs", "support", "trace", "versions")

    def __init__(self) -> None:
        self._taken: list[tuple[StepRecord, int, int, int]] = []
        self.logprobs: list[float] = []
        self.behavior: list[float] = []
        self.support: list[float] = []
        self.versions: list[int] = []
        self.from_draft: list[bool] = []
        self.trace: list[StepTrace] = []

    def take(self, record: StepRecord, row: int, anchor: int, count: int) -> None:
        """Note a step that committed `count` tokens behind `anchor`; the sample is `row` of its record."""
        self._taken.append((record, row, anchor, count))
        # Rows differ, so the samples of a batch do not all make their lists in the same step.
        if len(self._taken) >= UNSETTLED + row % UNSETTLED:
            self.settle()

    @property
    def record(self) -> StepRecord | None:
        """The last step's record, of all its samples in the order of the step; None when the lists hold that step."""
        return self._taken[-1][0] if self._taken else None

    @property
    def last(self) -> StepTrace:
        """The last step's trace; makes no lists."""
        if not self._taken:
            return self.trace[-1]
        record, row, anchor, _ = self._taken[-1]
        return _trace(record, row, anchor)

    def settle(self) -> SampleLog:
        """Bring the lists up to date; returns itself."""
        taken = self._taken
        if taken:
            self.logprobs += _row_parts([(each.logprob_DR, row, count) for each, row, _, count in taken])
            self.behavior += _row_parts([(each.behavior_DR, row, count) for each, row, _, count in taken])
            self.support += _row_parts([(each.support_DR, row, count) for each, row, _, count in taken])
            for each, row, anchor, count in taken:
                accepted = each.accepted[row]
                self.versions += [each.version] * count
                self.from_draft += [True] * min(accepted, count) + [False] * (count - accepted)
                self.trace.append(_trace(each, row, anchor))
            taken.clear()
        return self


def _trace(record: StepRecord, row: int, anchor: int) -> StepTrace:
    drafted = record.drafted[row]
    forwards = record.forwards if drafted else 1
    return StepTrace(anchor, drafted, record.accepted[row], record.start[row], record.length[row], forwards)


def _row_parts(parts: list[tuple[np.ndarray, int, int]]) -> list[float]:
    """The first numbers of a row of each array, one after another."""
    numbers: list[float] = np.concatenate([array_DR[row, :count] for array_DR, row, count in parts]).tolist()
    return numbers
