"""What passes between a trainer and the rollout service: requests, trajectories with log-probabilities, weight
versions.

Knows messages, sockets, the ledger of requests and trajectories, and the interface of a cluster (`rollout.backend`).
Does not know how tokens are made. `client` imports neither Ray, torch nor an engine.

`wire`: messages, their limits, sockets and keys, which both ends share. `client`: the trainer's end. `gateway`: the
service's end. `trainers`: the reference trainer.
"""
