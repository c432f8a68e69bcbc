"""Samples from an engine in this process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ...errors import RequestError
from ..engine import Engine
from ..failures import unless_failed
from ..types import RolloutRequest, Trajectory


class EngineSource:
    """A `SampleSource` of one engine, which does nothing else meanwhile.

    Raises:
        RequestError: the engine holds samples of earlier requests.
    """

    def __init__(self, engine: Engine) -> None:
        if engine.has_work:
            raise RequestError("engine", "holds samples of earlier requests", "end them with step() or abort() first")
        self._engine = engine

    @property
    def tokenizer(self) -> Any:
        """The policy's."""
        return self._engine.policy.tokenizer

    @property
    def max_positions(self) -> int:
        """The policy's longest sequence."""
        return self._engine.policy.config.max_position_embeddings

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        """Queue requests."""
        self._engine.check(*requests)
        for request in requests:
            self._engine.add(request)

    def take(self, seconds: float | None) -> list[Trajectory]:
        """Decode until a sample ends, or the time is over."""
        end = None if seconds is None else time.perf_counter() + seconds
        while self._engine.has_work:
            if done := unless_failed(self._engine.step(), self._engine.failed):
                return done
            if end is not None and time.perf_counter() >= end:
                break
        return []

    def cancel(self, request_ids: Sequence[str]) -> list[Trajectory]:
        """End requests between two steps; returns their samples, cut where they were."""
        return unless_failed(self._engine.cancel(request_ids), self._engine.failed)
