"""The service's side of the bridge.

Knows requests, trajectories, leases and weight versions, and the `RolloutBackend` it serves. Does not know how tokens
are made.

`gateway`: the thread that does everything but call the backend; `options` checks its arguments. `sessions`: the clients
that are connected; `absent_clients`: those that are gone. `message_router`: what each message does. `ledger`: requests and
trajectories on disk, over `ledger_file`, with `batch_parts`, `ledger_counters`, `retention` and `damage`.
`weight_receiver`: pushes, staged by `weight_stager` and kept on disk by `kept_versions`. `backend_driver`: the thread
that calls the backend. `storage_retries`: what waits for the disk. `gateway_status`: figures and notices.
`operations`: what operators ask for. `ledger_policy`: whose ledger it is. `kept_work`: what it keeps for the next gateway.
"""

from .gateway import Gateway

__all__ = ["Gateway"]
