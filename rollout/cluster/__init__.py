"""A pool of engines on Ray, which serves the bridge: placement, deaths, weight versions. The one folder that needs Ray to serve.

Knows engines and `backend`, the interface it implements. Does not know requests' trainers, leases or ledgers.

`pool`: the cluster. `actor`: one engine in a process of its own.
"""

from .pool import RayCluster

__all__ = ["RayCluster"]
