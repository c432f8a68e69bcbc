"""Tells listeners of this process what samples have made before they end. Nothing of it is recorded or sent to clients."""

from __future__ import annotations

from collections.abc import Callable

from ...rollout.backend import Progress, RolloutBackend

Listener = Callable[[Progress], None]


class ProgressFeed:
    """Listeners by request id. A backend that does not report unfinished samples tells them nothing."""

    def __init__(self, backend: RolloutBackend) -> None:
        self._backend = backend
        self._listeners: dict[str, Listener] = {}

    def watch(self, request_id: str, listener: Listener) -> None:
        """Calls `listener`, from the driver's thread, with what samples of this request make. To be called before the request is
        submitted; any thread may call it."""
        self._listeners[request_id] = listener
        if hasattr(self._backend, "watched"):
            self._backend.watched.add(request_id)

    def unwatch(self, request_id: str) -> None:
        """Ends `watch`. Any thread may call it."""
        self._listeners.pop(request_id, None)
        if hasattr(self._backend, "watched"):
            self._backend.watched.discard(request_id)

    def report(self) -> None:
        """Tells what came with the backend's last poll. The driver's thread."""
        if self._listeners and hasattr(self._backend, "take_progress"):
            for item in self._backend.take_progress():
                if (listener := self._listeners.get(item.request_id)) is not None:
                    listener(item)
