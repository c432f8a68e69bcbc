"""What a gateway says about itself: the weight version that serves, what keeps it from working, figures."""

from __future__ import annotations

from ..wire.codec import clip
from .backend_driver import BackendDriver
from .generation_control import GenerationControl
from .ledger import Ledger
from .sessions import Sessions
from .storage_retries import StorageRetries
from .weight_receiver import WeightReceiver

Figures = dict[str, float | int | str]


class GatewayStatus:
    """Reads the parts of one gateway. Used from the gateway's thread alone.

    Attributes:
        malformed: messages that could not be read, so far; counted by the message router.
    """

    def __init__(self, ledger: Ledger, driver: BackendDriver, sessions: Sessions, weights: WeightReceiver,
                 retries: StorageRetries, generation: GenerationControl) -> None:
        self._ledger, self._driver, self._sessions, self._weights = ledger, driver, sessions, weights
        self._retries, self._generation = retries, generation
        self.malformed = 0

    @property
    def version(self) -> int:
        """The weight version that was committed last."""
        return self._weights.version

    def notice(self) -> str:
        """What keeps the service from working, in one line; empty when nothing does."""
        backend = self._driver.notices(waiting=self._ledger.outstanding > 0)
        return clip("; ".join(filter(None, [self._weights.missing, *self._retries.notices(), *backend])))

    def figures(self) -> Figures:
        """Figures of the ledger, the gateway and the engines, by name."""
        counters, (size, free) = self._ledger.counters, self._ledger.size()
        return {
            "version": self.version, "in_flight": self._driver.in_flight, "sessions": len(self._sessions),
            "requested": counters.requested, "unique": counters.unique, "duplicates": counters.duplicates,
            "missing": counters.missing, "outstanding": self._ledger.outstanding,
            "failed": counters.failed, "acknowledged": counters.acknowledged,
            "stale": counters.stale, "malformed": self.malformed, "notice": self.notice(),
            "paused": self._generation.mode,
            "ledger_bytes": size, "ledger_free_bytes": free, "ledger_kept": counters.kept,
            **{f"engine.{name}": value for name, value in self._driver.stats.items()},
        }
