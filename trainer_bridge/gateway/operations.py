"""What operators ask of a running service: which engines there are, another number of them, a drain.

Invariants:
- Only control sessions reach this module.
- While the gateway drains, it leases nothing. It stops when the engines hold no work and the ledger has every output.
"""

from __future__ import annotations

import logging

from ..wire.codec import clip
from ..wire.limits import MAX_ENGINE_ROWS, MAX_ENGINES, MAX_FIGURE_TEXT, MAX_NAME
from ..wire.messages import Drain, Engines, EnginesRequest, Scale, Scaled
from .backend_driver import BackendDriver, ScaleEnded
from .sessions import Session, Sessions

_log = logging.getLogger(__package__)


class Operations:
    """Used from the gateway's thread alone.

    Attributes:
        draining: an operator asked for a drain.
    """

    def __init__(self, sessions: Sessions, driver: BackendDriver) -> None:
        self._sessions, self._driver = sessions, driver
        self.draining = False

    def engines(self, session: Session, message: EnginesRequest) -> None:
        """Answers with the engines from a place on."""
        every = self._driver.engines[:MAX_ENGINES]
        rows = tuple(
            (e.id, e.pid, clip(e.node, MAX_NAME), clip(e.device, MAX_NAME), e.state, e.version, float(e.tokens_per_s),
             clip(e.reason, MAX_FIGURE_TEXT)) for e in every[message.first : message.first + MAX_ENGINE_ROWS])  # fmt: skip
        self._sessions.reply(session.peer, Engines(message.number, len(every), rows))

    def scale(self, session: Session, message: Scale) -> None:
        """Has the cluster change the number of its engines; `scaled` answers."""
        _log.info("client %s asks for %d engines", session.client, message.engines)
        self._driver.scale(message.engines, session.peer, message.number)

    def scaled(self, event: ScaleEnded) -> None:
        """Tells the client that asked how the change ended."""
        if event.error is not None:
            _log.warning("%d engines are refused: %s", event.engines, event.error)
        self._sessions.reply(event.peer, Scaled(event.number, clip(str(event.error or ""))))

    def drain(self, session: Session, message: Drain) -> None:
        """The gateway leases nothing more, and stops when no work is left with the engines."""
        if not self.draining:
            _log.info("client %s asks the gateway to drain: %d samples are in flight", session.client, self._driver.in_flight)
        self.draining = session.asked_to_stop = True
