"""How rollouts are made: cache, samplers, scheduler, engine, and the Ray actors and cluster around engines.

Knows policies and requests. Does not know trainers, sockets or ledgers. `rollout.types` imports without torch.
"""
