"""Checks the arguments of a gateway. Each raises InvalidInput in one line."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from ...errors import InvalidInput
from ..wire.keys import ServerKeys

_BACKEND = ("submit", "poll", "revoke", "cancel", "commit_weights", "expected_weights", "stats")


def check_options(cluster: object, address: object, path: object, keys: object, counts: Mapping[str, tuple[Any, int, bool]],
                  seconds: Mapping[str, tuple[Any, bool]]) -> None:
    """The arguments of a Gateway.

    Args:
        counts: name -> (value, least, whether None is allowed).
        seconds: name -> (value, whether None is allowed).
    """
    lacking = [name for name in _BACKEND if not callable(getattr(cluster, name, None))]
    if lacking:
        raise InvalidInput("cluster", f"{_show(cluster)} has no {lacking[0]}()", "give a RolloutBackend, such as RayCluster")
    if not isinstance(address, str):
        raise InvalidInput("address", f"{_show(address)} is no text", "give tcp://HOST:PORT or ipc://PATH")
    if not isinstance(path, str | os.PathLike) or not os.fspath(path) or "\0" in str(path):
        raise InvalidInput("ledger_path", f"{_show(path)} is no path", "give the path of a file")
    if keys is not None and not isinstance(keys, ServerKeys):
        raise InvalidInput("keys", f"{_show(keys)} is no ServerKeys", "give ServerKeys(own=..., data=...)")
    for name, (value, least, optional) in counts.items():
        if not (optional and value is None) and (type(value) is not int or not least <= value < 2**63):
            raise InvalidInput(name, f"{_show(value)} is no whole number from {least} up",
                               "give a whole number" + " or None" * optional)
    for name, (value, optional) in seconds.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
        if not number and not (optional and value is None):
            raise InvalidInput(name, f"{_show(value)} is no finite number of seconds from 0 up",
                               "give seconds" + ", or None for no limit" * optional)


def _show(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:60] + '...'}"
