"""What passes between a trainer and the rollout service: messages, sockets, the durable ledger, weight versions, and the
reference GRPO trainer.

Knows requests, trajectories and weight manifests. `client` imports neither Ray, torch nor an engine.
"""
