"""Which tokens: drawn from q as drafts, verified against p, and what follows them.

Knows logits, seeds and sampling parameters. Does not know policies, caches or requests.

`sampler`: the four samplers, in torch. `kernels`: the same for rows that kernels serve. `processing`: temperature and cut-offs.
`adjustment`: penalties, biases and functions of the tokens so far, before the temperature. `top`: the most probable tokens.
`drafts`: what passes between two steps, and what a step commits.
"""
