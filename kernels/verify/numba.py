"""Sampling and verification row by row on a CPU, compiled by numba. Rows after the first rejected draft are not looked at.

Invariants:
- Tokens are those of `reference` on the same logits, but where two scores are equal up to rounding.
- A row's result depends on that row alone, to the last bit, and its log-probability on nothing but the row, the temperature and
  the token: `logprobs` gives what verification gave.
- Padding may hold anything, NaN included.

Legend: S sequences, M drafts, R = M + 1 rows, V vocabulary, W = ceil(V / 4) words of noise, N rows.
"""

from __future__ import annotations

import numpy as np
import torch

from ..compiled import compiled, exponentials, largest, wide_total
from ..philox.numba import fill_words, uniform
from .reference import Purpose, Rejection, Sampled

_F = np.float32
_NOISE, _ACCEPT, _RESAMPLE = int(Purpose.NOISE), int(Purpose.ACCEPT), int(Purpose.RESAMPLE)
_DEEPEST = _F(-87.0)


@compiled()
def _normalise(logits_V, temperature, excluded, x_V, weight_V):
    """Scaled logits x, weight = exp(x - top), and (top, log-sum-exp) of x."""
    count = x_V.shape[0]
    scale = _F(temperature) if temperature > 0 else _F(1.0)
    for v in range(count):
        x_V[v] = logits_V[v] / scale
    if excluded >= 0:
        x_V[excluded] = -np.inf
    top = largest(x_V, count)
    for v in range(count):
        weight_V[v] = x_V[v] - top
    exponentials(weight_V, count)
    for v in range(count):
        weight_V[v] = _F(0) if x_V[v] - top < _DEEPEST else weight_V[v]
    return top, np.float64(top) + np.log(wide_total(weight_V, count))


@compiled()
def _argmax(x_V, top):
    """The first token whose scaled logit is `top`, the largest; any where there is none."""
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
    """argmax(x + g). Noise is computed for the few tokens that can still win: g > d asks for 1 - u < exp(-d), which is twice
    exp(-d) and more in what is compared here, so that rounding costs nothing."""
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


@compiled()
def _draw(weight_V, u):
    """Inverse CDF."""
    target, s, last = u * wide_total(weight_V, weight_V.shape[0]), 0.0, 0
    for v in range(weight_V.shape[0]):
        if weight_V[v] > 0:
            s, last = s + np.float64(weight_V[v]), v
            if s > target:
                break
    return last


@compiled()
def _choose(x_V, weight_V, top, temperature, seed, position, purpose, words_W4):
    """One token: the most probable one, by noise (`purpose` NOISE), or by inverse CDF."""
    if temperature <= 0:
        return _argmax(x_V, top)
    if purpose == _NOISE:
        return _gumbel(x_V, weight_V, top, seed, position, words_W4)
    return _draw(weight_V, uniform(seed, position, purpose))


@compiled()
def _sample(logits_SRV, temperature_S, seed_S, position_S, excluded, purpose, token_SR, logprob_SR, lse_SR):
    sequences, rows, vocabulary = logits_SRV.shape
    x_V, weight_V = np.empty(vocabulary, _F), np.empty(vocabulary, _F)
    words_W4 = np.empty(((vocabulary + 3) // 4, 4), np.uint32)
    for s in range(sequences):
        for r in range(rows):
            top, lse = _normalise(logits_SRV[s, r], temperature_S[s], excluded, x_V, weight_V)
            token = _choose(x_V, weight_V, top, temperature_S[s], seed_S[s], position_S[s] + r, purpose, words_W4)
            token_SR[s, r], lse_SR[s, r] = token, lse
            logprob_SR[s, r] = _F(np.float64(x_V[token]) - lse)


@compiled()
def _chain(logits_SMV, pair_VV, previous_S, count_S, temperature_S, seed_S, position_S, excluded, purpose, token_SM, lse_SM):
    sequences, slots, vocabulary = logits_SMV.shape
    x_V, weight_V = np.empty(vocabulary, _F), np.empty(vocabulary, _F)
    words_W4 = np.empty(((vocabulary + 3) // 4, 4), np.uint32)
    for s in range(sequences):
        previous = previous_S[s]
        for k in range(slots):
            token_SM[s, k], lse_SM[s, k] = -1, 0
            if k < count_S[s]:
                logits_V = logits_SMV[s, k]
                for v in range(vocabulary):
                    logits_V[v] += pair_VV[previous, v]
                logits_V[excluded] = -np.inf
                top, lse = _normalise(logits_V, temperature_S[s], excluded, x_V, weight_V)
                previous = _choose(x_V, weight_V, top, temperature_S[s], seed_S[s], position_S[s] + k, purpose, words_W4)
                token_SM[s, k], lse_SM[s, k] = previous, lse


@compiled()
def _match(p_SRV, draft_SM, count_S, temperature_S, seed_S, anchor_S, accepted_S, token_SR, logprob_SR):
    sequences, rows, vocabulary = p_SRV.shape
    x_V, weight_V = np.empty(vocabulary, _F), np.empty(vocabulary, _F)
    words_W4 = np.empty(((vocabulary + 3) // 4, 4), np.uint32)
    for s in range(sequences):
        accepted_S[s] = -1
        for r in range(rows):
            token_SR[s, r], logprob_SR[s, r] = -1, 0
            if accepted_S[s] < 0:
                top, lse = _normalise(p_SRV[s, r], temperature_S[s], -1, x_V, weight_V)
                token = _choose(x_V, weight_V, top, temperature_S[s], seed_S[s], anchor_S[s] + 1 + r, _NOISE, words_W4)
                token_SR[s, r], logprob_SR[s, r] = token, _F(np.float64(x_V[token]) - lse)
                if r >= count_S[s] or draft_SM[s, r] != token:
                    accepted_S[s] = r


@compiled()
def _mix(p_V, q_V, weight, excluded, out_V):
    """The mixture's logits; exactly p's or q's at its ends."""
    w = _F(weight)
    for v in range(p_V.shape[0]):
        q = _F(-np.inf) if v == excluded else q_V[v]
        out_V[v] = p_V[v] if w >= 1 else (q if w <= 0 else w * p_V[v] + (_F(1.0) - w) * q)


@compiled()
def _probabilities(x_V, lse, weight_V):
    """exp(x - lse)."""
    for v in range(x_V.shape[0]):
        weight_V[v] = _F(np.float64(x_V[v]) - lse)
    exponentials(weight_V, x_V.shape[0])
    for v in range(x_V.shape[0]):
        weight_V[v] = _F(0) if _F(np.float64(x_V[v]) - lse) < _DEEPEST else weight_V[v]


@compiled()
def _reject(p_SRV, q_SMV, q_lse_SM, draft_SM, count_S, temperature_S, seed_S, anchor_S, excluded, mixed, mix_S, accepted_S,
            token_SR, logprob_SR, behavior_SR):  # fmt: skip
    sequences, rows, vocabulary = p_SRV.shape
    p_x_V, x_V, q_x_V = np.empty(vocabulary, _F), np.empty(vocabulary, _F), np.empty(vocabulary, _F)
    weight_V, q_V = np.empty(vocabulary, _F), np.empty(vocabulary, _F)
    for s in range(sequences):
        temperature, seed = temperature_S[s], seed_S[s]
        for r in range(rows):
            token_SR[s, r], logprob_SR[s, r], behavior_SR[s, r] = -1, 0, 0
        for r in range(rows):
            position, drafted = anchor_S[s] + 1 + r, r < count_S[s]
            _, p_lse = _normalise(p_SRV[s, r], temperature, -1, p_x_V, weight_V)
            lse, mixes = p_lse, mixed and drafted
            if mixes:
                _mix(p_SRV[s, r], q_SMV[s, r], mix_S[s], excluded, q_V)
                _, lse = _normalise(q_V, temperature, -1, x_V, weight_V)
            target_V = x_V if mixes else p_x_V
            if drafted:
                token = draft_SM[s, r]
                logq = np.float64(q_SMV[s, r, token] / _F(temperature)) - q_lse_SM[s, r]
                if token == excluded:
                    logq = -np.inf
                passes = uniform(seed, position, _ACCEPT) < np.exp(np.float64(target_V[token]) - lse - logq)
                if passes:
                    token_SR[s, r] = token
                    logprob_SR[s, r] = _F(np.float64(p_x_V[token]) - p_lse)
                    behavior_SR[s, r] = _F(np.float64(target_V[token]) - lse)
                    continue
            _probabilities(target_V, lse, weight_V)
            if drafted:
                for v in range(vocabulary):
                    q_x_V[v] = q_SMV[s, r, v] / _F(temperature)
                if excluded >= 0:
                    q_x_V[excluded] = -np.inf
                _probabilities(q_x_V, q_lse_SM[s, r], q_V)
                left = 0.0
                for v in range(vocabulary):
                    q_V[v] = max(weight_V[v] - q_V[v], _F(0))
                    left += np.float64(q_V[v])
                # No mass: p and q are equal to the last bit, and the rejection was rounding.
                if left > 0:
                    weight_V[:] = q_V
            token = _draw(weight_V, uniform(seed, position, _RESAMPLE))
            token_SR[s, r], accepted_S[s] = token, r
            logprob_SR[s, r] = _F(np.float64(p_x_V[token]) - p_lse)
            behavior_SR[s, r] = _F(np.float64(target_V[token]) - lse)
            break


@compiled()
def _logprobs(logits_NV, token_N, temperature_N, logprob_N):
    vocabulary = logits_NV.shape[1]
    x_V, weight_V = np.empty(vocabulary, _F), np.empty(vocabulary, _F)
    for n in range(logits_NV.shape[0]):
        _, lse = _normalise(logits_NV[n], temperature_N[n], -1, x_V, weight_V)
        logprob_N[n] = _F(np.float64(x_V[token_N[n]]) - lse)


def _flat(*tensors: torch.Tensor) -> list[np.ndarray]:
    """Contiguous arrays: of another layout numba would compile everything once more."""
    return [tensor.contiguous().numpy() for tensor in tensors]


def _empty(*shape: int, like: type = np.int64) -> np.ndarray:
    return np.empty(shape, like)


def sample(
    logits_SRV: torch.Tensor,
    temperature_S: torch.Tensor,
    seed_S: torch.Tensor,
    position_S: torch.Tensor,
    excluded: int,
    purpose: int,
) -> Sampled:
    """`reference.sample_gumbel` (purpose NOISE) and `reference.sample_cdf`."""
    shape = logits_SRV.shape[:2]
    out = _empty(*shape), _empty(*shape, like=np.float32), _empty(*shape, like=np.float64)
    _sample(*_flat(logits_SRV.float(), temperature_S.double(), seed_S, position_S), excluded, int(purpose), *out)
    return Sampled(*map(torch.from_numpy, out))


def draft_chain(
    logits_SMV: torch.Tensor,
    pair_VV: torch.Tensor,
    previous_S: torch.Tensor,
    count_S: torch.Tensor,
    temperature_S: torch.Tensor,
    seed_S: torch.Tensor,
    position_S: torch.Tensor,
    excluded: int,
    purpose: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the package's, of a table of pairs."""
    assert logits_SMV.is_contiguous()
    out = _empty(*logits_SMV.shape[:2]), _empty(*logits_SMV.shape[:2], like=np.float64)
    keys = _flat(previous_S, count_S, temperature_S.double(), seed_S, position_S)
    _chain(logits_SMV.numpy(), *_flat(pair_VV), *keys, excluded, int(purpose), *out)
    token_SM, lse_SM = map(torch.from_numpy, out)
    return token_SM, lse_SM


def verify_matching(
    p_logits_SRV: torch.Tensor,
    draft_SM: torch.Tensor,
    count_S: torch.Tensor,
    temperature_S: torch.Tensor,
    seed_S: torch.Tensor,
    anchor_S: torch.Tensor,
) -> Rejection:
    """As the package's."""
    s, r = p_logits_SRV.shape[:2]
    out = _empty(s), _empty(s, r), _empty(s, r, like=np.float32)
    _match(*_flat(p_logits_SRV.float(), draft_SM, count_S, temperature_S.double(), seed_S, anchor_S), *out)
    accepted_S, token_SR, logprob_SR = map(torch.from_numpy, out)
    return Rejection(accepted_S, token_SR, logprob_SR, logprob_SR)


def verify_rejection(
    p_logits_SRV: torch.Tensor,
    q_logits_SMV: torch.Tensor,
    q_lse_SM: torch.Tensor,
    draft_SM: torch.Tensor,
    count_S: torch.Tensor,
    temperature_S: torch.Tensor,
    seed_S: torch.Tensor,
    anchor_S: torch.Tensor,
    excluded: int = -1,
    mix_weight_S: torch.Tensor | None = None,
) -> Rejection:
    """`reference.verify_rejection`."""
    s, r = p_logits_SRV.shape[:2]
    out = _empty(s), _empty(s, r), _empty(s, r, like=np.float32), _empty(s, r, like=np.float32)
    temperature_S = temperature_S.double()
    weight_S = temperature_S if mix_weight_S is None else mix_weight_S.double()
    arrays = _flat(p_logits_SRV.float(), q_logits_SMV.float(), q_lse_SM, draft_SM, count_S, temperature_S, seed_S, anchor_S)
    _reject(*arrays, excluded, mix_weight_S is not None, *_flat(weight_S), *out)
    return Rejection(*map(torch.from_numpy, out))


def logprobs(logits_NV: torch.Tensor, token_N: torch.Tensor, temperature_N: torch.Tensor) -> torch.Tensor:
    """`reference.logprobs`."""
    out = _empty(len(token_N), like=np.float32)
    _logprobs(*_flat(logits_NV.float(), token_N, temperature_N.double()), out)
    return torch.from_numpy(out)
