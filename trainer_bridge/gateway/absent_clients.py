"""Pauses the work of clients that are gone.

Invariants:
- Work of a client that has had no session for `grace` seconds is not run: its queued requests wait in the ledger, its
  leased ones end in the cluster and wait too. A client without a session when the gateway starts is gone from then on.
- Nothing is lost by a pause. The next session of the client queues its work again, in its old order.
"""

from __future__ import annotations

import logging

from ...errors import StorageError
from .backend_driver import BackendDriver
from .ledger import Ledger
from .sessions import Sessions

_log = logging.getLogger(__package__)
GRACE_S = 600.0
"""Seconds a client may be gone before its work is paused: longer than a trainer takes to restart and load a checkpoint."""
CHECK_S = 1.0
"""Seconds between two looks at the sessions."""


class AbsentClients:
    """Used from the gateway's thread alone. `grace`: seconds; None never pauses."""

    def __init__(self, sessions: Sessions, ledger: Ledger, driver: BackendDriver, grace: float | None) -> None:
        self._sessions, self._ledger, self._driver, self._grace = sessions, ledger, driver, grace
        self._since: dict[str, float] = {}
        self._next = 0.0

    def check(self, now: float) -> None:
        """Pauses the work of the clients that have been gone for too long. `now`: of the monotonic clock."""
        if self._grace is None or now < self._next:
            return
        self._next = now + min(CHECK_S, self._grace)
        absent = self._ledger.clients_at_work() - {session.client for session in self._sessions}
        self._since = {client: self._since.get(client, now) for client in absent}
        for client, since in self._since.items():
            if now - since >= self._grace:
                self._pause(client)

    def _pause(self, client: str) -> None:
        try:
            leased = self._ledger.pause(client)
        except StorageError as error:
            _log.warning("the work of client %s, which is gone, cannot be paused now: %s", client, error)
            return
        if leased:
            self._driver.cancel(leased)
        _log.info("client %s is gone for %g s; its work waits until it is back (%d requests were leased)", client,
                  self._grace, len(leased))
