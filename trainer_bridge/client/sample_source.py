"""Samples from a rollout service, for a search.

Imports neither torch nor an engine.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...errors import TransportError
from ...rollout.types import RolloutRequest, Trajectory
from .message_loop import NoTrajectory
from .rollout_client import RolloutClient


class ServiceSource:
    """A `rollout.search.source.SampleSource` over a client, which does nothing else meanwhile.

    Requests get names of this object, so one client may search again and again, and questions may have names that are too long
    for the wire. A service does not return what a cancelled sample had, so `cancel` returns nothing.

    Args:
        client: connected to the service.
        tokenizer: that of the service's policy.
        max_positions: most tokens of a sequence of that policy.
    """

    def __init__(self, client: RolloutClient, tokenizer: Any, max_positions: int) -> None:
        self._client, self._tokenizer, self._positions = client, tokenizer, max_positions
        self._prefix, self._count = f"search-{uuid.uuid4().hex[:12]}/", 0
        self._theirs: dict[str, str] = {}  # the search's name -> that on the wire, of what is outstanding
        self._ours: dict[str, str] = {}

    @property
    def tokenizer(self) -> Any:
        """The policy's."""
        return self._tokenizer

    @property
    def max_positions(self) -> int:
        """The policy's longest sequence."""
        return self._positions

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        """Hand requests to the gateway; returns when they are in its ledger."""
        named = [replace(request, id=f"{self._prefix}{self._count + i}") for i, request in enumerate(requests)]
        self._client.submit(named)
        self._count += len(named)
        self._theirs.update((ours.id, theirs.id) for ours, theirs in zip(requests, named, strict=True))
        self._ours.update((theirs.id, ours.id) for ours, theirs in zip(requests, named, strict=True))

    def take(self, seconds: float | None) -> list[Trajectory]:
        """The next sample that arrives, or none within `seconds`.

        Raises:
            RequestRefused: the service cannot serve a request. TransportError: the gateway does not answer.
        """
        try:
            found = self._client.take(seconds, "raise")
        except NoTrajectory:
            return []
        if found is None:  # nothing is outstanding at the service
            if self._ours:
                raise TransportError(f"{len(self._ours)} requests of this search ended without a sample; search again")
            return []
        if (name := self._ours.pop(found[1].request_id, None)) is None:  # it was cancelled, or is of an earlier use of the client
            return []
        del self._theirs[name]
        found[1].request_id = name
        return [found[1]]

    def cancel(self, request_ids: Sequence[str]) -> list[Trajectory]:
        """End requests; returns when the gateway's ledger has it."""
        names = [self._theirs.pop(name) for name in request_ids]
        for name in names:
            del self._ours[name]
        self._client.cancel(names)
        return []
