"""Functions of one row of logits on a CPU, compiled by numba: the normaliser, a draw by noise or by inverse CDF, a mixture of two
rows, what is left of p where q is taken away.

Invariants:
- Arithmetic is float32, sums float64. A row's result depends on that row alone, to the last bit.
- A token of weight 0 is never drawn from a row that has weight.
- A row of NaN gives some token, and no error.

Legend: V vocabulary, W = ceil(V / 4) words of noise.
"""

from __future__ import annotations

import numpy as np

from ..compiled import STRETCH, compiled, divide, exponential, largest, stretch_total, wide_total
from ..philox.numba import fill_words, uniform
from .reference import Purpose

_F = np.float32
_NOISE = int(Purpose.NOISE)
_DEEPEST = _F(-87.0)
"""A scaled logit below it has weight 0."""


@compiled()
def _weight(x):
    """exp(x) of a logit x relative to the normaliser."""
    return _F(0) if x < _DEEPEST else exponential(x)


@compiled()
def normalise(logits_V, temperature, excluded, x_V, weight_V):
    """Scaled logits x, weight = exp(x - top), and (top, sum of the weights, log-sum-exp) of x."""
    count = x_V.shape[0]
    top = divide(logits_V, _F(temperature) if temperature > 0 else _F(1.0), x_V)
    if excluded >= 0:
        x_V[excluded] = -np.inf
        top = largest(x_V, count)
    for v in range(count):
        weight_V[v] = _weight(x_V[v] - top)
    total = wide_total(weight_V, count)
    return top, total, np.float64(top) + np.log(total)


@compiled()
def _argmax(x_V, top):
    """The first token whose scaled logit is `top`, the largest; any token if none equals it (a row of NaN)."""
    for v in range(x_V.shape[0]):
        if x_V[v] == top:
            return v
    return 0


@compiled()
def _noisy(x, word):
    """x + g in float32."""
    u = (np.float64(word) + 0.5) * 2.0**-32
    return x + _F(-np.log(-np.log(u)))


@compiled()
def _gumbel(x_V, weight_V, top, seed, position, words_W4):
    """argmax(x + g). Noise is computed only for tokens that can still win: g > d implies 1 - u < exp(-d). The comparison allows
    twice exp(-d), so that rounding excludes no winner."""
    words_V = words_W4.reshape(-1)
    fill_words(seed, position, _NOISE, words_W4)
    first = _argmax(x_V, top)
    token, best = first, _noisy(top, words_V[first])
    reach = np.exp(np.float64(top) - np.float64(best)) * 2.0**33
    for v in range(x_V.shape[0]):
        if 2.0**32 - np.float64(words_V[v]) < np.float64(weight_V[v]) * reach:
            score = _noisy(x_V[v], words_V[v])
            if score > best or (score == best and v < token):
                token, best = v, score
                reach = np.exp(np.float64(top) - np.float64(best)) * 2.0**33
    return token


@compiled(inlined=True)
def draw(weight_V, total, u):
    """Inverse CDF: the first token at which the running sum exceeds u * `total`, the sum of all. Where rounding leaves none, the
    last token with weight of the stretch that was searched; 0 in a row without weight."""
    count, target, before, begin = weight_V.shape[0], u * total, 0.0, 0
    while begin + STRETCH < count:
        after = before + stretch_total(weight_V, begin)
        if after > target:
            break
        before, begin = after, begin + STRETCH
    end = min(begin + STRETCH, count)
    for v in range(begin, end):
        before += np.float64(weight_V[v])
        if before > target:
            return v
    for v in range(end - 1, -1, -1):
        if weight_V[v] > 0:
            return v
    return 0


@compiled(inlined=True)
def choose(x_V, weight_V, top, total, temperature, seed, position, purpose, words_W4):
    """One token: the most probable one, by noise (`purpose` NOISE), or by inverse CDF."""
    if temperature <= 0:
        return _argmax(x_V, top)
    if purpose == _NOISE:
        return _gumbel(x_V, weight_V, top, seed, position, words_W4)
    return draw(weight_V, total, uniform(seed, position, purpose))


@compiled()
def mix(p_V, q_V, weight, excluded, out_V):
    """The mixture's logits; exactly p's or q's at its ends."""
    w = _F(weight)
    for v in range(p_V.shape[0]):
        q = _F(-np.inf) if v == excluded else q_V[v]
        out_V[v] = p_V[v] if w >= 1 else (q if w <= 0 else w * p_V[v] + (_F(1.0) - w) * q)


@compiled()
def probabilities(x_V, lse, weight_V):
    """exp(x - lse)."""
    for v in range(x_V.shape[0]):
        weight_V[v] = _weight(_F(np.float64(x_V[v]) - lse))


@compiled()
def residual(p_V, q_logits_V, temperature, q_lse, excluded, out_V):
    """max(p - q, 0) of probabilities p, and of q's logits with their log-sum-exp over the temperature."""
    temperature = _F(temperature)
    for v in range(p_V.shape[0]):
        q = _weight(_F(np.float64(q_logits_V[v] / temperature) - q_lse))
        out_V[v] = max(p_V[v] - q, _F(0))
    if excluded >= 0:
        out_V[excluded] = p_V[excluded]
