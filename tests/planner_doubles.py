"""What a planner reads of samples, and tables of step times for it."""

from __future__ import annotations

from dataclasses import dataclass, field

from blockroll.rollout.planning.planner import candidates
from blockroll.rollout.planning.step_costs import StepCosts, rows
from blockroll.rollout.types import RolloutRequest

BLOCK = 16
SCHEDULES = candidates(BLOCK)


@dataclass(eq=False)
class Running:
    """What a planner reads of a sample."""

    request: RolloutRequest
    tokens: list[int]
    remaining: int = 100
    draft_count: int = 0
    finish: str | None = None
    trace: list = field(default_factory=list)

    @property
    def anchor(self):
        return len(self.tokens) - 1

    @property
    def log(self):
        return self

    @property
    def record(self):
        return None

    @property
    def last_step(self):
        return self.trace[-1]


@dataclass
class Traced:
    anchor: int
    drafted: int
    accepted: int
    draft_start: int


def costs(base, per_row):
    """A forward takes base + per_row for each row of each sequence."""
    forwards = {s: 2 if s.kind == "two_pass" else 1 for s in SCHEDULES}
    return StepCosts({s.label: {b: forwards[s] * base + per_row * b * rows(s) for b in (1, 64)} for s in SCHEDULES}, 64)
