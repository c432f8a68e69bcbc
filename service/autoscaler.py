"""Lets the number of engines follow the queue, within bounds.

The cluster asks Ray for the resources of each engine. Where no node has them free, Ray's own autoscaler starts a node, and it
ends one that is idle. So this module decides how many engines there should be, and nothing about machines.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import BlockrollError
from ..trainer_bridge.client import ServiceControl
from ..trainer_bridge.wire.key_files import load_client_keys
from .config import Engines, ServiceConfig

_log = logging.getLogger(__package__)
LOOK_S = 2.0
"""Seconds between two looks at the queue. Starting an engine takes several."""


def wanted_engines(engines: Engines, outstanding: int) -> int:
    """Engines that `outstanding` samples fill, each with its batch, within the bounds."""
    assert engines.min is not None and engines.max is not None
    return min(max(math.ceil(outstanding / engines.batch), engines.min), engines.max)


class Decision:
    """Turns what is wanted at each look into a number of engines: more at once, fewer after `idle_seconds`."""

    def __init__(self, engines: Engines) -> None:
        self._engines, self._since, self._peak = engines, 0.0, 0

    def restart(self, now: float) -> None:
        """Engines are idle from now on at the earliest."""
        self._since, self._peak = now, 0

    def engines(self, outstanding: int, present: int, now: float) -> int:
        """The number of engines from now on.

        Args:
            outstanding: samples that are asked for and have not ended, of clients whose work is not paused.
            present: engines there are. now: seconds.
        """
        wanted = wanted_engines(self._engines, outstanding)
        if wanted >= present:
            self.restart(now)
            return wanted
        self._peak = max(self._peak, wanted)
        if now - self._since < self._engines.idle_seconds:
            return present
        found, self._since, self._peak = self._peak, now, 0
        return found


@contextmanager
def following_queue(config: ServiceConfig, address: str) -> Iterator[None]:
    """While the block runs, a thread keeps the number of engines where the queue wants it. Without bounds nothing runs."""
    if not config.engines.follows_queue:
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_follow, args=(config, address, stop), name="blockroll-autoscaler", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _follow(config: ServiceConfig, address: str, stop: threading.Event) -> None:
    keys = load_client_keys(config.delivery.keys) if config.delivery.keys else None
    decision = Decision(config.engines)
    with ServiceControl(address, keys=keys) as control:
        while not stop.wait(LOOK_S):
            try:
                status = control.status()
                if status.figures.get("paused"):  # what is queued waits for the end of the pause, not for engines
                    decision.restart(time.monotonic())
                    continue
                present = len(status.engines)
                outstanding = int(status.figures["outstanding"])
                number = decision.engines(outstanding, present, time.monotonic())
                if number != present:
                    _log.info("%d samples are outstanding: %d engines instead of %d", outstanding, number, present)
                    control.scale(number)
            except BlockrollError as error:
                if not stop.is_set():
                    _log.warning("the number of engines stays: %s", error)
