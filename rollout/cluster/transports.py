"""The transports of weight versions by name."""

from __future__ import annotations

from ...errors import ClusterError
from .shared_weights import SharedMemoryTransport
from .weight_transport import TRANSPORTS, RayTransport, Transport, WeightTransport


def transport_of(name: Transport, timeout: float) -> WeightTransport:
    """A transport. `timeout`: seconds that one transfer may take. Raises ClusterError for an unknown name."""
    if name not in TRANSPORTS:
        raise ClusterError(f"weight_transport: unknown value {name!r}; use one of {', '.join(TRANSPORTS)}")
    if name == "torch_distributed":
        from .broadcast_weights import BroadcastTransport  # torch takes seconds to import

        return BroadcastTransport(timeout)
    return SharedMemoryTransport() if name == "shared_memory" else RayTransport()
