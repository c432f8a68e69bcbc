"""The service's side of the bridge.

Knows requests, trajectories, leases and weight versions, and the `RolloutBackend` it serves. Does not know how tokens
are made.

`gateway`: the thread that does everything but call the backend. `sessions`: the clients that are connected.
`message_router`: what each message does. `ledger` (over `ledger_file`): requests and trajectories on disk.
`weight_receiver`: pushes, staged by `weight_stager` and kept on disk by `kept_versions`. `backend_driver`: the thread
that calls the backend. `gateway_status`: figures and notices. `operations`: what operators ask for. `ledger_policy`:
whose ledger it is.
"""

from .gateway import Gateway

__all__ = ["Gateway"]
