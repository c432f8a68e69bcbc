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
        self._closed, self._waiting = folder / "closed", folder / "waiting"
        self._waiting.mkdir()

    @contextmanager
    def guards(self) -> Iterator[None]:
        """Engines that start in this block have the gate, for as long as they live."""
        closed, waiting = self._closed, self._waiting  # engines get a copy of what the class below refers to

        class GuardedActor(EngineActor.__ray_metadata__.modified_class):  # type: ignore[misc,name-defined]
            def load(self) -> Any:
                loaded, engine = super().load(), self._engine
                step = engine.step

                def guarded_step() -> Any:
                    samples, here = 0, waiting / str(os.getpid())
                    with suppress(FileNotFoundError):
                        samples = int(closed.read_text())
                    if samples and (here.exists() or engine.scheduler.pending < samples):
                        time.sleep(_LOOK_S)
                        return []
                    ended = step()
                    if samples and sum(not is_fresh(sample) for sample in engine.scheduler.running) >= samples:
                        here.touch()
                    return ended

                engine.step = guarded_step
                return loaded

        with pytest.MonkeyPatch.context() as patch:
            actor = ray.remote(**EngineActor._default_options)(GuardedActor)  # type: ignore[attr-defined]
            patch.setattr(handle, "EngineActor", actor)
            yield

    @contextmanager
    def closed(self, samples: int) -> Iterator[Callable[[], int]]:
        """In this block an engine waits for so many samples, makes steps until so many have a token, and then makes none.

        Yields a function that says how many engines have come to the end of this and wait.
        """
        for name in self._waiting.iterdir():
            name.unlink()
        written = self._closed.with_suffix(".new")
        written.write_text(str(samples))
        written.replace(self._closed)
        try:
            yield lambda: len(list(self._waiting.iterdir()))
        finally:
            self._closed.unlink()
