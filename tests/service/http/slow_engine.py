"""Engines of a live service whose steps a test may slow down, so that what it does to samples in flight does not race them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from blockroll.rollout.cluster import handle
from blockroll.rollout.cluster.actor import EngineActor

_STEP_S = 0.1
"""The least duration of a slow step."""


class SlowSteps:
    """What a test and the engines of its service have in common.

    Args: folder: where a file says that steps are slow, and another how many samples have begun.
    """

    def __init__(self, folder: Path) -> None:
        self._slow, self._begun = folder / "slow", folder / "begun"

    @contextmanager
    def engines(self) -> Iterator[None]:
        """Engines that start meanwhile obey."""
        slow, begun = self._slow, self._begun

        class SlowEngineActor(EngineActor.__ray_metadata__.modified_class):  # type: ignore[misc,name-defined]
            def load(self) -> Any:
                loaded, step = super().load(), self._engine.step

                def slow_step() -> Any:
                    end = time.monotonic() + _STEP_S
                    while slow.exists() and time.monotonic() < end:
                        time.sleep(0.005)
                    ended = step()
                    if slow.exists():
                        running = self._engine.scheduler.running
                        written = begun.with_suffix(".new")
                        written.write_text(str(sum(len(each.tokens) > len(each.request.prompt_tokens) for each in running)))
                        written.replace(begun)
                    return ended

                self._engine.step = slow_step
                return loaded

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(handle, "EngineActor", ray.remote(**EngineActor._default_options)(SlowEngineActor))  # type: ignore[attr-defined]
            yield

    @contextmanager
    def slowed(self) -> Iterator[None]:
        """A step takes a tenth of a second meanwhile: 300 tokens take more than three seconds."""
        self._begun.unlink(missing_ok=True)
        self._slow.touch()
        try:
            yield
        finally:
            self._slow.unlink()

    def until_begun(self, samples: int) -> None:
        """Waits until so many samples run and have a generated token each. Raises if that takes 20 s."""
        end = time.monotonic() + 20
        while not self._begun.exists() or int(self._begun.read_text()) < samples:
            assert time.monotonic() < end
            time.sleep(0.01)
