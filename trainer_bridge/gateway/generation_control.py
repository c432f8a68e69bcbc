"""Pauses and resumes generation, and aborts requests, for trainers and operators.

Invariants:
- While the gateway is paused it leases nothing. Submissions are recorded and queued in each mode, and run after the pause.
- keep: the samples that engines hold stop between two steps. wait: they finish. abort: every open request ends where it is.
- An aborted request is answered: each of its unfinished samples is recorded with the tokens that it has and the finish reason
  `abort`. So requested = unique + failed holds in every mode.
- The one who asked is answered when it is so: no engine makes a step, and every sample that ended is in the ledger, on
  disk.
- A pause lasts as long as the gateway's process. A drain ends it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field

from ...errors import ClusterError, StorageError
from ..wire.codec import clip
from ..wire.messages import Abort, Done, Pause, ResetPrefixCache, Resume
from .aborting import Aborted
from .backend_driver import BackendDriver
from .ledger import Ledger
from .sessions import Session, Sessions
from .storage_retries import StorageRetries

_log = logging.getLogger(__package__)


@dataclass
class _Waiting:
    """Someone who is answered when every call has ended and `settled` is true."""

    peer: bytes
    number: int
    settled: Callable[[], bool]
    calls: list[Future[None]] = field(default_factory=list)
    resets: bool = False
    pauses: bool = False


class GenerationControl:
    """Used from the gateway's thread alone.

    Attributes:
        mode: of the pause; "" while there is none.
    """

    def __init__(self, sessions: Sessions, ledger: Ledger, driver: BackendDriver, retries: StorageRetries) -> None:
        self._sessions, self._ledger, self._driver, self._retries = sessions, ledger, driver, retries
        self._aborted: list[Aborted] = []
        self._queued: list[Aborted] = []  # those of which requests may be queued
        self._waiting: list[_Waiting] = []
        self._news = set[str]()  # clients with samples that an abort has ended
        self.mode = ""

    @property
    def holds_back(self) -> bool:
        """Whether nothing may be leased now."""
        return bool(self.mode or self._queued) or any(aborted.request_ids is None for aborted in self._aborted)

    def handle(self, session: Session, message: Pause | Resume | Abort | ResetPrefixCache) -> None:
        """Begins what a message wants; its sender is answered later. Where the ledger cannot be read, nothing has begun."""
        mode = self.mode
        try:
            self._begin(session, message)
        except StorageError as error:
            self.mode = mode
            self._answer(session.peer, message.number, str(error))

    def _begin(self, session: Session, message: Pause | Resume | Abort | ResetPrefixCache) -> None:
        if not self._driver.interruptible:
            self._answer(session.peer, message.number, "this cluster can neither be paused nor abort requests")
        elif isinstance(message, Pause):
            self._pause(session, message)
        elif isinstance(message, Resume):
            self._log(session, "ends the pause")
            self.resume(_Waiting(session.peer, message.number, lambda: True))
        elif isinstance(message, Abort):
            self._log(session, f"aborts {len(message.ids) or 'all'} requests")
            aborted = self._abort(message.ids or None)
            self._waiting.append(_Waiting(session.peer, message.number, lambda: aborted not in self._aborted))
        else:
            self._waiting.append(_Waiting(session.peer, message.number, lambda: True, [self._driver.reset_prefix_cache()]))

    def resume(self, waiting: _Waiting | None = None) -> None:
        """Ends the pause, if there is one. Pauses that are still to begin are answered with an error."""
        self.mode = ""
        for other in [other for other in self._waiting if other.pauses]:
            self._waiting.remove(other)
            self._answer(other.peer, other.number, "the pause was ended before it had begun")
        if waiting is not None:
            self._waiting.append(waiting)
        if self._driver.holding:
            call = self._driver.hold(False)
            if waiting is not None:
                waiting.calls.append(call)

    def advance(self, now: float) -> set[str]:
        """Goes on with what was begun, and answers what has ended; returns the clients that have something new."""
        if not self.busy or not self._retries.due("abort", now):
            return set()
        try:
            self._advance()
        except StorageError as error:
            self._retries.failed("abort", error, now)
        else:
            self._retries.worked("abort")
        clients, self._news = self._news, set()
        return clients

    def requeued(self) -> None:
        """Leased work is queued again. What of it is to be aborted is not leased anew."""
        self._queued = list(self._aborted)

    def _advance(self) -> None:
        for aborted in list(self._aborted):
            found = self._ledger.abort_queued(aborted)
            self._news |= found
            if not (left := self._ledger.any_open(aborted)):
                self._aborted.remove(aborted)
            if aborted in self._queued and not (found and left):
                self._queued.remove(aborted)
        for waiting in list(self._waiting):
            if not all(call.done() for call in waiting.calls) or not waiting.settled():
                continue
            errors = [str(error) for call in waiting.calls if isinstance(error := call.exception(), ClusterError)]
            if waiting.resets and not errors:
                waiting.resets, waiting.calls = False, [self._driver.reset_prefix_cache()]
                continue
            self._ledger.sync()
            self._waiting.remove(waiting)
            self._answer(waiting.peer, waiting.number, errors[0] if errors else "")

    @property
    def busy(self) -> bool:
        """Whether something that was begun has not ended."""
        return bool(self._aborted or self._waiting)

    def _pause(self, session: Session, message: Pause) -> None:
        self._log(session, f"pauses generation (mode {message.mode})")
        self.mode = message.mode
        waiting = _Waiting(session.peer, message.number, lambda: True, resets=message.reset_cache, pauses=True)
        if message.mode == "keep":
            waiting.calls.append(self._driver.hold(True))
        else:
            waiting.settled = lambda: not self._ledger.any_leased()
            if message.mode == "abort":
                aborted = self._abort(None)
                waiting.settled = lambda: aborted not in self._aborted
            if self._driver.holding:
                waiting.calls.append(self._driver.hold(False))
        self._waiting.append(waiting)

    def _abort(self, request_ids: Collection[str] | None) -> Aborted:
        aborted = Aborted(request_ids, self._ledger.newest())
        self._aborted.append(aborted)
        self._queued.append(aborted)
        self._driver.abort(request_ids)
        return aborted

    def _answer(self, peer: bytes, number: int, error: str) -> None:
        self._sessions.reply(peer, Done(number, clip(error)))

    @staticmethod
    def _log(session: Session, what: str) -> None:
        _log.info("client %s %s", session.client, what)
