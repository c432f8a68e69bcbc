"""Checks of what a caller gives to a client. Each raises InvalidInput, or RequestError about requests, in one line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from ...errors import InvalidInput, RequestError
from ...rollout.backend import IN_FLIGHT_POLICIES
from ...rollout.types import RolloutRequest
from ..wire.keys import ClientKeys
from ..wire.limits import MAX_ID

OnError = Literal["raise", "skip"]
_CLIENT_ID = 100
"""Bytes of a client id, which leaves room in a name of the wire (MAX_NAME)."""


def show(value: object) -> str:
    """A value for an error: short, on one line."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:60] + '...'}"


def check_connection(address: object, client_id: object, keys: object, timeout: object, ack: object) -> None:
    """The arguments of `connect`."""
    if not isinstance(address, str):
        raise InvalidInput("address", f"{show(address)} is no text", "give tcp://HOST:PORT or ipc://PATH")
    if client_id is not None and not isinstance(client_id, str):
        raise InvalidInput("client_id", f"{show(client_id)} is no text", "give a name, or None for a random one")
    if client_id and (len(client_id.encode("utf-8", "replace")) > _CLIENT_ID or not client_id.isprintable()):
        raise InvalidInput("client_id", f"{client_id[:120]!r} is too long or not printable",
                           f"use at most {_CLIENT_ID} bytes of printable text")
    if keys is not None and not isinstance(keys, ClientKeys):
        raise InvalidInput("keys", f"{show(keys)} is no ClientKeys", "give ClientKeys(server=..., data=...)")
    if ack not in ("auto", "manual"):
        raise InvalidInput("ack", f"unknown mode {show(ack)}", "use 'auto' or 'manual'")
    if not is_seconds(timeout) or timeout == 0:
        raise InvalidInput("timeout", f"{show(timeout)} is no finite number of seconds above 0", "give seconds, such as 30.0")


def is_seconds(value: Any) -> bool:
    """Whether a value is a finite number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value) and value >= 0
    except OverflowError:
        return False


def check_seconds(name: str, value: object) -> None:
    """An optional time."""
    if value is not None and not is_seconds(value):
        raise InvalidInput(name, f"{show(value)} is no finite number of seconds from 0 up", "give seconds, or None for no limit")


def check_on_error(value: object) -> None:
    """What happens about a request that is refused."""
    if value not in ("raise", "skip"):
        raise InvalidInput("on_error", f"unknown value {show(value)}", "use 'raise' or 'skip'")


def request_list(requests: Iterable[RolloutRequest]) -> list[RolloutRequest]:
    """Requests of one batch, as a list."""
    return _list("requests", requests, RolloutRequest, "give a list of RolloutRequest")


def _list(name: str, items: Any, kind: Any, remedy: str) -> list[Any]:
    if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
        raise RequestError(name, f"{show(items)} is no list", remedy)
    found = list(items)
    for place, item in enumerate(found):
        if not isinstance(item, kind):
            raise RequestError(f"{name}[{place}]", f"{show(item)} cannot be taken", remedy)
    return found


def done_list(done: Iterable[Any], kinds: Any) -> list[Any]:
    """What is acknowledged, as a list."""
    return _list("done", done, kinds, "give trajectories, RequestRefused errors or requests")


def id_list(request_ids: Iterable[str]) -> list[str]:
    """Request ids, each once."""
    names = list(dict.fromkeys(_list("request_ids", request_ids, str, "give a list of request ids")))
    for name in names:
        if not 0 < len(name.encode("utf-8", "replace")) <= MAX_ID or "\ud800" <= max(name) <= "\udfff":
            raise RequestError("request_ids", f"{show(name)} is no request id", f"give 1 to {MAX_ID} bytes of text")
    return names


def check_push(version: object, tensors: object, allow_gap: object, in_flight: object) -> None:
    """The arguments of `push_weights`, but for the tensors themselves."""
    if type(version) is not int or not 1 <= version < 2**31:
        raise InvalidInput("version", f"{show(version)} is no whole number in 1..2**31-1", "count versions from 1")
    if not isinstance(tensors, Mapping):
        raise InvalidInput("tensors", f"{show(tensors)} is no mapping", "give {name: array}, such as policy.state_dict()")
    if type(allow_gap) is not bool:
        raise InvalidInput("allow_gap", f"{show(allow_gap)} is neither True nor False", "use True or False")
    if in_flight not in IN_FLIGHT_POLICIES:
        raise InvalidInput("in_flight", f"unknown policy {show(in_flight)}", f"use one of {', '.join(IN_FLIGHT_POLICIES)}")
