"""Numbers the calls that are made with each of verl's request ids: an agent loop makes several with one."""

from __future__ import annotations

from collections import OrderedDict

MAX_COUNTED = 1 << 16
"""Request ids that are remembered: more than take part in one step. The one that was used least recently goes first."""


class Turns:
    """Calls by request id."""

    def __init__(self) -> None:
        self._turns = OrderedDict[str, int]()

    def take(self, request_id: str) -> int:
        """The number of this call among those of the request id, from 0 on."""
        turn = self._turns.pop(request_id, 0)
        self._turns[request_id] = turn + 1
        if len(self._turns) > MAX_COUNTED:
            self._turns.popitem(last=False)
        return turn

    def __len__(self) -> int:
        return len(self._turns)
