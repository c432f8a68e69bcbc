"""What operators ask of a running service: which engines there are, another number of them, a drain, which tensors a weight
version has.

Invariants:
- Only control sessions reach this module.
- While the gateway drains, it leases nothing. It stops when the engines hold no work and the ledger has every output.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ...errors import ClusterError
from ..wire import limits
from ..wire.codec import clip
from ..wire.messages import Drain, Engines, EnginesRequest, Scale, Scaled, Tensors, TensorsRequest
from .backend_driver import BackendDriver
from .generation_control import GenerationControl
from .sessions import Session, Sessions

_log = logging.getLogger(__package__)


class Operations:
    """Used from the gateway's thread alone.

    Args:
        expected: name -> (dtype, shape) of every tensor of a weight version.
        generation: pauses, which a drain ends.

    Attributes:
        draining: an operator asked for a drain.
    """

    def __init__(self, sessions: Sessions, driver: BackendDriver, expected: Mapping[str, tuple[str, tuple[int, ...]]],
                 generation: GenerationControl) -> None:
        self._sessions, self._driver, self._generation = sessions, driver, generation
        self._tensors = [(clip(name, limits.MAX_TENSOR_NAME), clip(dtype, limits.MAX_NAME), tuple(shape))
                         for name, (dtype, shape) in expected.items()]
        self.draining = False

    def tensors(self, session: Session, message: TensorsRequest) -> None:
        """Answers with the tensors of a weight version from a place on."""
        rows = tuple(self._tensors[message.first : message.first + limits.MAX_FORMS])
        self._sessions.reply(session.peer, Tensors(message.number, len(self._tensors), rows))

    def engines(self, session: Session, message: EnginesRequest) -> None:
        """Answers with the engines from a place on."""
        every = self._driver.engines()[:limits.MAX_ENGINES]
        rows = tuple(_row(engine) for engine in every[message.first : message.first + limits.MAX_ENGINE_ROWS])
        self._sessions.reply(session.peer, Engines(message.number, len(every), rows))

    def scale(self, session: Session, message: Scale) -> None:
        """Sets how many engines the cluster should have, and answers whether the cluster takes the number."""
        error = ""
        try:
            self._driver.scale(message.engines)
        except ClusterError as refusal:
            error = str(refusal)
        _log.info("client %s asks for %d engines%s", session.client, message.engines, error and f": refused ({error})")
        self._sessions.reply(session.peer, Scaled(message.number, clip(error)))

    def drain(self, session: Session, message: Drain) -> None:
        """The gateway leases nothing more, and stops when no work is left with the engines."""
        if not self.draining:
            _log.info("client %s asks the gateway to drain: %d samples are in flight", session.client, self._driver.in_flight)
            self._generation.resume()
        self.draining = session.asked_to_stop = True


def _row(engine: Any) -> tuple[Any, ...]:
    """An `EngineStatus` as a message holds it."""
    figures = tuple((clip(name, limits.MAX_ENGINE_FIGURE), float(value)) for name, value in engine.figures.items())
    return (engine.id, engine.pid, clip(engine.node, limits.MAX_NAME), clip(engine.device, limits.MAX_NAME), engine.state,
            engine.version, float(engine.tokens_per_s), clip(engine.reason, limits.MAX_FIGURE_TEXT),
            figures[:limits.MAX_ENGINE_FIGURES])
