"""A pool of engines on Ray that implements `rollout.backend`: placement, failures, weight versions. Imports Ray.

Knows engines and `backend`. Does not know trainers, sockets or ledgers.

`pool`: the cluster. `spec`: what engines are started with. `worker`: one place of it, which serves an `assignment` after the
other. `actor`: one engine in a process of its own. `ray_start`, `ray_errors`: Ray itself. Names are resolved on first use, so
that Ray can be started before torch is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pool import RayCluster
    from .spec import EngineSpec, EngineStatus

_PUBLIC = {"EngineSpec": "spec", "EngineStatus": "spec", "RayCluster": "pool"}

__all__ = ["EngineSpec", "EngineStatus", "RayCluster"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
