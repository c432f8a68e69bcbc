"""Takes the answers of some requests out of a client's inbox while they arrive."""

from __future__ import annotations

from collections.abc import Collection

from ...rollout.types import Trajectory
from .connection import RequestRefused
from .pending_requests import Arrival, PendingRequests


class Collector:
    """Collects what arrives of `request_ids`.

    Attributes:
        found: each trajectory of these requests, as it arrived and opened.
        refused: their refusals, by request id.
        others: items of other requests, in their order.
    """

    def __init__(self, pending: PendingRequests, request_ids: Collection[str]) -> None:
        self._pending, self._ids = pending, request_ids
        self.found: list[tuple[Arrival, Trajectory]] = []
        self.refused: dict[str, RequestRefused] = {}
        self.others: list[Arrival | RequestRefused] = []

    def drain(self) -> None:
        """Empties the inbox, which frees the credit window."""
        while self._pending.inbox:
            item = self._pending.take()
            if item.request_id not in self._ids:
                self.others.append(item)
            elif isinstance(item, RequestRefused):
                self.refused[item.request_id] = item
            else:
                self.found.append((item, item.open()))

    def put_back(self) -> None:
        """Puts everything back into the inbox."""
        self._pending.put_back([*self.others, *self.refused.values(), *(item for item, _ in self.found)])
