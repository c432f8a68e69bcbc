"""Chooses tokens: draws drafts from q, verifies them against p, and draws the token after the accepted ones.

Knows logits, seeds and sampling parameters. Does not know policies, caches or requests.

`sampler`: the four samplers, in torch. `kernels`: the same samplers for rows that kernels serve. `processing`: temperature and
cut-offs. `adjustment`: penalties, biases and functions of the tokens so far, before the temperature. `top`: the most probable
tokens. `drafts`: what passes between two steps, and what a step commits.
"""
