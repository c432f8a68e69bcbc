"""Acceptance of drafts, and the draw of the token after them.

Rejection (p: target, q: what the draft d was drawn from, u: uniform numbers):

    accept d  iff  u q(d) < p(d)                                 that is, with probability min(1, p(d) / q(d))
    first rejected row:  x ~ max(p - q, 0) / sum max(p - q, 0)   no mass there: x ~ p
    all accepted:        x ~ p of the row after the last draft

so that each committed token is distributed as p. Source: speculative sampling, arXiv 2211.17192 and 2302.01318.

Matching (x_k: the token the target gives at row k without any draft):

    accept d_k  iff  d_k = x_k;   the first x_k that differs is committed in its place

so that the committed tokens are those of decoding without drafts. With x = argmax(log p + g), g Gumbel noise, x ~ p.
"""

from .reference import count_accepted, count_matching, draw, gumbel_argmax, mix_logits, residual_weights

__all__ = ["count_accepted", "count_matching", "draw", "gumbel_argmax", "mix_logits", "residual_weights"]
