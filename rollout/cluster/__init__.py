"""A pool of engines on Ray that implements `rollout.backend`: placement, failures, weight versions. Imports Ray.

Knows engines and `backend`. Does not know trainers, sockets or ledgers.

`pool`: the cluster. `spec`: what its engines are started with. `fleet`: its engines, as many as are wanted. `handle`: one of
them, seen from the pool; `actor`: the same, in a process of its own; `reports`: what travels between the two. `work`: what is to
be done; `dispatch`: who does it; `suspects`: what engines die of. `weight_commit`: a version for all of them or none.
`placement`, `ray_start`, `ray_errors`: Ray itself.
"""

from .pool import RayCluster
from .spec import EngineSpec, EngineStatus

__all__ = ["EngineSpec", "EngineStatus", "RayCluster"]
