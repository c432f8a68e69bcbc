"""AR to block diffusion: data, objective, stages and training.

Knows documents and losses. Does not know how a policy is sampled: acceptance here is the overlap of p and q on a training
pack; tokens per forward are measured by the engine. To change what a stage does, start in `config.py`; to change the loss,
in `objective.py`.
"""
