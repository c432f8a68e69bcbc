"""What passes between a trainer and the rollout service: messages, sockets, the durable ledger, weight versions, and the
reference GRPO trainer.

Knows requests, trajectories and weight manifests. Does not know how tokens are made. `client` imports neither Ray,
torch nor an engine.

What travels: `messages` on the wire, `records` inside them and in the ledger, `weights` in chunks; `codec` writes and
bounds all of it, `transport` carries it, `keys` say who may. The trainer's side: `client`, over `delivery` (what it
submits and is sent, booked in `tracks`) and `control` (pushes), each on a `connection`. The service's side: `gateway`,
over `ledger`, `sessions` (clients), `pushes` (weight versions) and `dispatch` (the cluster). A trainer: `grpo`, with
its `grpo_config`, `grpo_loss` and `report`; `service` starts what it trains against.
"""
