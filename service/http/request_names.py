"""The names that clients gave to requests which run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class RequestNames:
    """The names that clients gave to requests which run, and the ids of these. Used from the event loop."""

    def __init__(self) -> None:
        self._ids: dict[str, list[str]] = {}

    def ids(self, names: list[str]) -> list[str]:
        """The ids of the requests of these names. A name that no client gave is an id."""
        return [request_id for name in names for request_id in self._ids.get(name, [name])]

    @contextmanager
    def named(self, name: str | None, request_id: str) -> Iterator[None]:
        """A request runs under a name."""
        if name is None:
            yield
            return
        self._ids.setdefault(name, []).append(request_id)
        try:
            yield
        finally:
            self._ids[name].remove(request_id)
            if not self._ids[name]:
                del self._ids[name]
