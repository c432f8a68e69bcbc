"""A pool of engines on Ray, which serves the bridge: placement, deaths, weight versions. Imports Ray.

Knows engines, and the interface it implements (`backend`). Does not know trainers, sockets or ledgers.

`pool`: the cluster. `actor`: one engine in a process of its own.
"""

from .pool import RayCluster

__all__ = ["RayCluster"]
