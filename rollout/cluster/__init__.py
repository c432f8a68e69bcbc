"""A pool of engines on Ray that implements `rollout.backend`: placement, failures, weight versions. Imports Ray.

Knows engines and `backend`. Does not know trainers, sockets or ledgers.

`pool`: the cluster. `worker`: one place of it, which serves an `assignment` after the other. `actor`: one engine in a
process of its own. `ray_start`, `ray_errors`: Ray itself.
"""

from .pool import RayCluster
from .spec import EngineSpec, EngineStatus

__all__ = ["EngineSpec", "EngineStatus", "RayCluster"]
