"""Collects the answers of some requests for one call, while other calls may take the answers of other requests."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from ...rollout.types import Trajectory
from .connection import RequestRefused
from .pending_requests import Arrival, PendingRequests


class Collector:
    """Claims what arrives of `request_ids`: it comes here and not into the inbox. What is in the inbox is taken over.

    Attributes:
        items: what has come and was not opened.
        found: each trajectory of these requests, as it arrived and opened.
        refused: their refusals, by request id.
    """

    def __init__(self, pending: PendingRequests, request_ids: Collection[str]) -> None:
        self._pending, self._ids = pending, request_ids
        self.items: deque[Arrival | RequestRefused] = deque()
        self.found: list[tuple[Arrival, Trajectory]] = []
        self.refused: dict[str, RequestRefused] = {}
        pending.claim(request_ids, self.items)

    def drain(self) -> None:
        """Opens what has come."""
        self._pending.free_window()
        while self.items:
            item = self.items[0]
            if isinstance(item, RequestRefused):
                self.refused[item.request_id] = item
            else:
                self.found.append((item, item.open()))
            self.items.popleft()

    def release(self) -> None:
        """Ends the claim: what arrives from now on comes into the inbox."""
        self._pending.unclaim(self._ids)

    def put_back(self) -> None:
        """Puts everything back into the inbox."""
        self._pending.put_back([*self.refused.values(), *(item for item, _ in self.found), *self.items])
