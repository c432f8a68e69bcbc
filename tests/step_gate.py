"""Holds engines in other processes between two steps, so that what a test does to samples in flight does not race them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import ray

from blockroll.rollout.cluster import handle
from blockroll.rollout.cluster.actor import EngineActor
from blockroll.rollout.sample_group import is_fresh

_LOOK_S = 0.005


class StepGate:
    """A gate in front of the steps of some engines. It is open at first. An engine behind it takes requests, weights and calls.

    Args: folder: an empty one, where the test and the engines tell each other what they do.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._closings = folder, 0

    @contextmanager
    def guards(self) -> Iterator[None]:
        """Engines that start in this block have the gate, for as long as they live."""
        folder = self._folder  # engines get a copy of what the class below refers to

        class GuardedActor(EngineActor.__ray_metadata__.modified_class):  # type: ignore[misc,name-defined]
            def load(self) -> Any:
                loaded, engine = super().load(), self._engine
                step, counted = engine.step, [0, 0]  # a closing of the gate, and how many samples have ended since

                def guarded_step() -> Any:
                    closing = begun = ended = 0
                    with suppress(FileNotFoundError):
                        closing, begun, ended = map(int, (folder / "closed").read_text().split())
                    if not closing:
                        return step()
                    if counted[0] != closing:
                        counted[:] = closing, 0
                    waits = folder / f"{closing}-{os.getpid()}"
                    if waits.exists() or engine.scheduler.pending < begun:
                        time.sleep(_LOOK_S)
                        return []
                    done = step()
                    counted[1] += len(done)
                    if counted[1] >= ended and sum(not is_fresh(sample) for sample in engine.scheduler.running) >= begun:
                        waits.touch()
                    return done

                engine.step = guarded_step
                return loaded

        with pytest.MonkeyPatch.context() as patch:
            actor = ray.remote(**EngineActor._default_options)(GuardedActor)  # type: ignore[attr-defined]
            patch.setattr(handle, "EngineActor", actor)
            yield

    @contextmanager
    def closed(self, begun: int, ended: int = 0) -> Iterator[Callable[[], int]]:
        """In this block an engine makes steps until `ended` samples have ended and `begun` others have a token, and then none. It
        makes the first one when it has `begun` samples.

        Yields a function that says how many engines have made the last one.
        """
        self._closings += 1
        closed, closing = self._folder / "closed", self._closings
        written = closed.with_suffix(".new")
        written.write_text(f"{closing} {begun} {ended}")
        written.replace(closed)
        try:
            yield lambda: len(list(self._folder.glob(f"{closing}-*")))
        finally:
            closed.unlink()
