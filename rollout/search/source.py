"""What makes samples for a search: the protocol of an engine in this process and of a service.

This module imports neither torch nor Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ..types import RolloutRequest, Trajectory


class SampleSource(Protocol):
    """Makes samples of requests. One search, or several at once, use it from one thread.

    A search asks for one sample per request. Each has a seed of its own, so a sample does not depend on which others were asked
    for with it. Prompts that begin alike share K/V through the engine's prefix cache.
    """

    @property
    def tokenizer(self) -> Any:
        """The policy's; None where it has none."""

    @property
    def max_positions(self) -> int:
        """Most tokens of a sequence, prompt included."""

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        """Begin these requests. Raises RequestError where one cannot be served; then none was begun."""

    def take(self, seconds: float | None) -> list[Trajectory]:
        """Samples that have ended: at least one, unless none does within `seconds` (None: as long as it takes). Samples of
        requests that were cancelled may be among them."""

    def cancel(self, request_ids: Sequence[str]) -> list[Trajectory]:
        """End these requests. Returns what they have so far, where the source knows it."""
