"""What a sample's steps gave: log-probabilities, versions and trace, one entry per generated token or step.

A step's record serves all its samples. A sample notes which row of it is its own, and how many tokens it took; the log is made
when somebody reads it, or for many steps at once.

Invariant: a sample keeps at most `2 * UNSETTLED` records, which hold the numbers of its neighbours too.

Legend: D decoding samples, R most tokens of one of them, N generated tokens of a sample.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .types import StepTrace

UNSETTLED = 64
"""Steps after which the log is made."""
_NO_NUMBERS = np.empty((3, 0), dtype=np.float32)


class StepRecord(NamedTuple):
    """One step of D samples.

    Attributes:
        drafted, accepted, start, length: one number per sample, as in `StepTrace`.
        numbers_3DR: float32, log-probabilities, behavior log-probabilities and support masses, as in `Verdict`, in memory of
            their own.
        version: of the weights. forwards: forward passes of the step.
    """

    drafted: list[int]
    accepted: list[int]
    start: list[int]
    length: list[int]
    numbers_3DR: np.ndarray
    version: int
    forwards: int


class SampleLog:
    """The log of one sample. It is up to date after `settle`.

    Attributes:
        numbers_3N: float32, log-probabilities, behavior log-probabilities and support masses.
        versions: one entry per generated token, as in `Trajectory`. from_draft: a byte per generated token, 1 for a draft.
        trace: one entry per decode step.
    """

    __slots__ = ("_taken", "from_draft", "numbers_3N", "trace", "versions")

    def __init__(self) -> None:
        self._taken: list[tuple[StepRecord, int, int, int]] = []
        self.numbers_3N = _NO_NUMBERS
        self.versions: list[int] = []
        self.from_draft = bytearray()
        self.trace: list[StepTrace] = []

    def take(self, record: StepRecord, row: int, anchor: int, count: int) -> None:
        """Note a step that committed `count` tokens behind `anchor`; the sample is `row` of its record."""
        taken = self._taken
        taken.append((record, row, anchor, count))
        # Rows differ, so the samples of a batch do not all make their logs in the same step.
        if len(taken) >= UNSETTLED and len(taken) >= UNSETTLED + row % UNSETTLED:
            self.settle()

    @property
    def record(self) -> StepRecord | None:
        """The last step's record, of all its samples in the order of the step; None once the log holds that step."""
        return self._taken[-1][0] if self._taken else None

    @property
    def last(self) -> StepTrace:
        """The last step's trace; the log stays as it is."""
        if not self._taken:
            return self.trace[-1]
        record, row, anchor, _ = self._taken[-1]
        return _trace(record, row, anchor)

    def settle(self) -> SampleLog:
        """Bring the log up to date; returns itself."""
        taken = self._taken
        if taken:
            parts = [each.numbers_3DR[:, row, :count] for each, row, _, count in taken]
            if self.trace:
                parts.insert(0, self.numbers_3N)
            self.numbers_3N = np.concatenate(parts, axis=1)
            versions, from_draft, trace = self.versions, self.from_draft, self.trace
            for each, row, anchor, count in taken:
                accepted = each.accepted[row]
                versions += [each.version] * count
                from_draft += b"\1" * accepted + b"\0" if accepted < count else b"\1" * count
                trace.append(_trace(each, row, anchor))
            taken.clear()
        return self

    @property
    def surely_finite(self) -> bool:
        """Every number of the log is finite. False may also mean that the sum of their squares is out of range."""
        flat_N = self.numbers_3N.ravel()
        return math.isfinite(flat_N.dot(flat_N))


def _trace(record: StepRecord, row: int, anchor: int) -> StepTrace:
    drafted = record.drafted[row]
    forwards = record.forwards if drafted else 1
    return StepTrace(anchor, drafted, record.accepted[row], record.start[row], record.length[row], forwards)
