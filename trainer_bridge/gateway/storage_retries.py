"""Which kinds of a gateway's work the disk refuses at present, and when each is tried again."""

from __future__ import annotations

import logging

from ...errors import StorageError

_log = logging.getLogger(__package__)
RETRY_S = 0.5
"""Seconds until refused work is tried again."""


class StorageRetries:
    """Kinds of work are words: "record", "dispatch", "commit", "send", "acknowledge", "abort". Times are of the monotonic clock.

    Args:
        patience: seconds one kind of work may be refused without end before the error is raised; None for ever.
    """

    def __init__(self, patience: float | None) -> None:
        self._patience = patience
        self._errors: dict[str, StorageError] = {}
        self._since: dict[str, float] = {}
        self._next: dict[str, float] = {}

    def due(self, work: str, now: float) -> bool:
        """Whether the work may be tried."""
        return now >= self._next.get(work, 0.0)

    def postpone(self, work: str, now: float) -> None:
        """The work is to be tried again in RETRY_S seconds."""
        self._next[work] = now + RETRY_S

    def failed(self, work: str, error: StorageError, now: float) -> None:
        """The disk refused the work. Raises `error` when it has done so for longer than `patience`."""
        if work not in self._errors:
            _log.warning("cannot %s, trying again every %g s: %s", work, RETRY_S, error)
        self._errors[work] = error
        self.postpone(work, now)
        since = self._since.setdefault(work, now)
        if self._patience is not None and now - since > self._patience:
            raise error

    def worked(self, work: str) -> None:
        """The disk took the work."""
        if self._errors.pop(work, None) is not None:
            _log.info("can %s again", work)
        self._since.pop(work, None)

    def notices(self) -> list[str]:
        """Why the disk refuses, one line per kind of work."""
        return [str(error) for error in self._errors.values()]
