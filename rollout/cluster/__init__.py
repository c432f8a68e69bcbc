"""A pool of engines on Ray that implements `rollout.backend`: placement, failures, weight versions. Imports Ray.

Knows engines and `backend`. Does not know trainers, sockets or ledgers.

`pool`: the cluster. `spec`: what its engines are started with. `fleet`: its engines, as many as are wanted. `handle`: one of
them, seen from the pool; `actor`: the same, in a process of its own; `reports`: what travels between the two. `work`: what is to
be done; `dispatch`: who does it; `suspects`: what engines die of. `weight_commit`: a version for all of them or none.
`placement`, `ray_start`, `ray_errors`: Ray itself.

Names are resolved on first use, so that Ray can be started before torch is imported.
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
