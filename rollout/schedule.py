"""What one decode step runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ..model.arguments import is_list, is_whole, require, short

DEFAULT_LEVELS = (0, 4, 8)
ScheduleKind = Literal["auto", "ar", "two_pass", "fused"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """The shape of a decode step.

    Attributes:
        kind: `ar` runs `[anchor]`; `two_pass` drafts with a first pass that knows the anchor and verifies with a second;
            `fused` verifies and proposes in one pass; `auto` leaves the choice to the engine's planner, step by step.
        drafts: most drafts verified per step (m); None for as many as a block gives.
        levels: acceptance lengths `fused` proposes for; 0 is always among them.
        block: mask rows of each proposal of `fused`; None for the engine's block size.
    """

    kind: ScheduleKind = "fused"
    drafts: int | None = None
    levels: tuple[int, ...] = DEFAULT_LEVELS
    block: int | None = None

    def __post_init__(self) -> None:
        require(self.kind in ("auto", "ar", "two_pass", "fused"), "schedule", f"unknown schedule {short(self.kind)}",
                "use auto, ar, two_pass or fused")
        require(self.drafts is None or (is_whole(self.drafts) and 1 <= self.drafts <= 64), "schedule.drafts",
                f"{short(self.drafts)} is outside 1..64", "use at most a block's tokens")
        require(self.block is None or (is_whole(self.block) and 2 <= self.block <= 64), "schedule.block",
                f"{short(self.block)} is outside 2..64", "use at most the block size")
        require(is_list(self.levels) and all(is_whole(level) and 0 <= level < 64 for level in self.levels), "levels",
                f"{short(self.levels)} holds a level outside 0..63", "use levels below the block size")
        object.__setattr__(self, "levels", tuple(sorted({0, *self.levels})))

    def within(self, block_size: int) -> Schedule:
        """The same step with every size a number, for blocks of at most `block_size`: what it cannot use is cut off."""
        if self.kind == "auto":
            return self
        if self.kind == "ar":
            return Schedule("ar", levels=(0,))
        block = min(self.block or block_size, block_size)
        if self.kind == "two_pass":
            return Schedule("two_pass", min(self.drafts or block, block), (0,), block)
        # The token after the accepted drafts takes a slot, so a block of B gives at most B - 1 drafts.
        drafts = min(self.drafts or block, block - 1)
        levels = tuple(level for level in self.levels if level <= drafts)
        return replace(self, drafts=drafts, levels=levels, block=block)

    @property
    def label(self) -> str:
        """As tables name it: `ar`, `two_pass(8)`, `fused(15, {0,4}, 16)` (drafts, levels, mask rows per proposal)."""
        if self.kind == "two_pass":
            return f"two_pass({self.drafts or 'all'})"
        if self.kind == "fused":
            levels = ",".join(map(str, self.levels))
            return f"fused({self.drafts or 'all'}, {{{levels}}}, {self.block or 'all'})"
        return self.kind
