"""What the policy computes: the token layout, the ZAYA network over it, its checkpoints, and its conversion to block
diffusion.

Knows tensors, tokens and files. Does not know requests, sampling, Ray or sockets.
"""
