"""What one decode step runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import RequestError

ScheduleKind = Literal["ar", "two_pass", "fused"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """The shape of a decode step.

    Attributes:
        kind: `ar` runs `[anchor]`; `two_pass` drafts with a first pass that knows the anchor and verifies with a second;
            `fused` verifies and proposes in one pass.
        drafts: most drafts verified per step (m); None for as many as a block gives.
        levels: acceptance lengths `fused` proposes for; 0 is always among them.
    """

    kind: ScheduleKind = "fused"
    drafts: int | None = None
    levels: tuple[int, ...] = (0, 4)

    def __post_init__(self) -> None:
        if self.kind not in ("ar", "two_pass", "fused"):
            raise RequestError("schedule", f"unknown schedule {self.kind!r}", "use ar, two_pass or fused")
        if self.drafts is not None and not 1 <= self.drafts <= 64:
            raise RequestError("schedule.drafts", f"{self.drafts} is outside 1..64", "use at most a block's tokens")
        if any(not 0 <= level < 64 for level in self.levels):
            raise RequestError("levels", f"{self.levels} holds a level outside 0..63", "use levels below the block size")
        object.__setattr__(self, "levels", tuple(sorted({0, *self.levels})))
