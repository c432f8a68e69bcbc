"""What an engine counts about itself, for those who watch a service."""

from __future__ import annotations

from collections.abc import Sequence

from ..engine import Engine
from ..types import StepTrace

SLOTS = 16
"""Drafts per step whose acceptance is counted, one by one."""


class EngineFigures:
    """Counts over the life of an engine's process.

    Samples are counted when they end, so acceptance costs nothing per step.

    Attributes:
        commit_seconds: between two steps, in which the engine took its last weight version.
    """

    def __init__(self) -> None:
        self._drafted, self._accepted, self._samples = [0] * SLOTS, [0] * SLOTS, 0
        self.commit_seconds = 0.0

    def note(self, trace: Sequence[StepTrace]) -> None:
        """A sample has ended; `trace` says what its steps drafted and accepted."""
        self._samples += 1
        for step in trace:
            for slot in range(min(step.drafted, SLOTS)):
                self._drafted[slot] += 1
                self._accepted[slot] += slot < step.accepted

    def read(self, engine: Engine) -> dict[str, float]:
        """Figures of this moment. `accepted.K` and `drafted.K`: how often the K-th draft of a step was accepted, and verified.
        `pages`: of the K/V pool. `running`, `queue`: samples that are decoded, and that wait for a place."""
        scheduler, cache = engine.scheduler, engine.cache
        running = len(scheduler.running)
        found: dict[str, float] = {
            "forwards": engine.forwards, "decode_tokens": engine.decode_tokens, "preemptions": scheduler.preemptions,
            "samples": self._samples, "running": running, "queue": scheduler.pending - running,
            "pages": cache.total_pages, "pages_free": cache.free_pages, "commit_seconds": self.commit_seconds,
        }  # fmt: skip
        for slot, count in enumerate(self._drafted):
            if count:
                found[f"drafted.{slot + 1}"], found[f"accepted.{slot + 1}"] = count, self._accepted[slot]
        return found
