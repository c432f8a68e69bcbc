"""Which trajectories a client's callers were handed and have not acknowledged.

A caller is a thread, or what CALLER says (a task of asyncio). What one caller was handed is acknowledged at its own next
call, since another caller's call says nothing about it. Tasks are held weakly: what a task was handed that is gone is
acknowledged at the next call of anyone.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Container, Hashable, Iterable
from contextvars import ContextVar

from ...errors import TransportError
from ...rollout.types import RolloutRequest, Trajectory
from ..wire.records import FAILURE
from .connection import RequestRefused
from .pending_requests import Arrival, PendingRequests

Key = tuple[str, int]
CALLER: ContextVar[Hashable] = ContextVar("caller", default=None)
"""Who calls; None for the thread."""


class HandedOut:
    """(request id, sample) of each, by caller. The user holds the lock of the message loop."""

    def __init__(self) -> None:
        self._keys: dict[Hashable, list[Key]] = {}
        self._thread = threading.local()

    def add(self, key: Key) -> None:
        """The caller is handed this."""
        self._keys.setdefault(self._caller(), []).append(key)

    def pop(self) -> list[Key]:
        """What the caller was handed, and tasks that are gone. It is forgotten here."""
        found = self._keys.pop(self._caller(), [])
        for caller in [caller for caller in self._keys if isinstance(caller, weakref.ref) and caller() is None]:
            found += self._keys.pop(caller)
        return found

    def all(self) -> list[Key]:
        """What every caller was handed."""
        return [key for keys in self._keys.values() for key in keys]

    def remove(self, keys: Container[Key]) -> None:
        """Forgets these, whoever was handed them."""
        for caller, handed in list(self._keys.items()):
            if left := [key for key in handed if key not in keys]:
                self._keys[caller] = left
            else:
                del self._keys[caller]

    def _caller(self) -> Hashable:
        if (task := CALLER.get()) is not None:
            return weakref.ref(task)
        # A thread is known by an object of its own, since the numbers of threads are used again.
        if not hasattr(self._thread, "caller"):
            self._thread.caller = object()
        caller: Hashable = self._thread.caller
        return caller


def keys_of(items: Iterable[Trajectory | RequestRefused | RolloutRequest], handed: Container[Key],
            pending: PendingRequests) -> tuple[dict[Key, None], set[str]]:
    """What is acknowledged with these items, in order, and the ids of the requests that are acknowledged whole."""
    found: dict[Key, None] = {}
    whole: set[str] = set()
    for item in items:
        if isinstance(item, RolloutRequest):
            known = pending.requests.get(item.id)
            samples = range(item.samples) if known is None or known.submission is None else known.arrived
            found.update(((item.id, i), None) for i in samples)
            found[item.id, FAILURE] = None
            whole.add(item.id)
        elif isinstance(item, RequestRefused):
            found.update((k, None) for r in (item, *item.others) if (k := (r.request_id, FAILURE)) in handed)
        elif item.key in handed:
            found[item.key] = None
    return found, whole


def opened(pending: PendingRequests, most: int) -> list[tuple[Arrival, Trajectory]]:
    """Takes up to `most` trajectories from the inbox, up to the first refusal. One that cannot be read raises TransportError
    where it is the first; otherwise it stays for the next call."""
    found = list[tuple[Arrival, Trajectory]]()
    while len(found) < most and pending.inbox and isinstance(pending.inbox[0], Arrival):
        item = pending.take()
        assert isinstance(item, Arrival)
        try:
            found.append((item, item.open()))
        except TransportError:
            if not found:
                raise
            pending.put_back([item])
            break
    return found
