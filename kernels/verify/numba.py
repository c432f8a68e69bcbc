"""Sampling and verification on a CPU, compiled by numba. Sequences are computed one after another, and their rows one after
another (`rows`). Rows after the first rejected draft are not read.

Invariants:
- Tokens are those of `reference` on the same logits, unless two scores are equal up to rounding.
- A row's result depends on that row alone, to the last bit. Its log-probability depends on the row, the temperature and the
  token alone, so `logprobs` returns the number that verification returned.
- Padding may hold anything, NaN included.

Legend: S sequences, M drafts, R = M + 1 rows, V vocabulary, W = ceil(V / 4) words of noise, N rows; x_at, the address of x.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from ..addresses import doubles, floats, integers
from ..compiled import compiled, wide_total
from ..philox.numba import uniform
from .calls import Chain, Verification
from .reference import Purpose, Rejection, Sampled
from .rows import choose, draw, mix, normalise, probabilities, residual

_F = np.float32
_NOISE, _ACCEPT, _RESAMPLE = int(Purpose.NOISE), int(Purpose.ACCEPT), int(Purpose.RESAMPLE)


@compiled()
def _buffers(vocabulary):
    """Room for one row: its logits over the temperature, its weights and its random words."""
    return np.empty(vocabulary, _F), np.empty(vocabulary, _F), np.empty(((vocabulary + 3) // 4, 4), np.uint32)


@compiled()
def _sample(logits_SRV, temperature_S, seed_S, position_S, excluded, purpose, token_SR, logprob_SR, lse_SR):
    sequences, rows, vocabulary = logits_SRV.shape
    x_V, weight_V, words_W4 = _buffers(vocabulary)
    for s in range(sequences):
        for r in range(rows):
            top, total, lse = normalise(logits_SRV[s, r], temperature_S[s], excluded, x_V, weight_V)
            token = choose(x_V, weight_V, top, total, temperature_S[s], seed_S[s], position_S[s] + r, purpose, words_W4)
            token_SR[s, r], lse_SR[s, r] = token, lse
            logprob_SR[s, r] = _F(np.float64(x_V[token]) - lse)


@compiled()
def draw_chain(chain):
    """`draft_chain` of a `Chain`."""
    sequences, slots, vocabulary = chain.sequences, chain.slots, chain.vocabulary
    logits_SMV = floats(chain.logits_at, (sequences, slots, vocabulary))
    pair_VV = floats(chain.pair_at, (vocabulary, vocabulary))
    first_N = floats(chain.first_at, (sequences - 1) * chain.first_stride + vocabulary)
    previous_S, count_S = integers(chain.previous_at, sequences), integers(chain.count_at, sequences)
    seed_S, anchor_S = integers(chain.seed_at, sequences), integers(chain.anchor_at, sequences)
    temperature_S = doubles(chain.temperature_at, sequences)
    token_SM, lse_SM = integers(chain.token_at, (sequences, slots)), doubles(chain.lse_at, (sequences, slots))
    x_V, weight_V, words_W4 = _buffers(vocabulary)
    scale = _F(chain.first_scale)
    for s in range(sequences):
        previous = previous_S[s]
        for k in range(slots):
            token_SM[s, k], lse_SM[s, k] = -1, 0
            if k < count_S[s]:
                logits_V = logits_SMV[s, k]
                if chain.known and k == 0:
                    begin = s * chain.first_stride
                    first_V = first_N[begin : begin + vocabulary]
                    for v in range(vocabulary):
                        logits_V[v] = first_V[v] * scale
                else:
                    for v in range(vocabulary):
                        logits_V[v] += pair_VV[previous, v]
                logits_V[chain.excluded] = -np.inf
                top, total, lse = normalise(logits_V, temperature_S[s], -1, x_V, weight_V)
                position = anchor_S[s] + 1 + k
                previous = choose(x_V, weight_V, top, total, temperature_S[s], seed_S[s], position, chain.purpose, words_W4)
                token_SM[s, k], lse_SM[s, k] = previous, lse


@compiled()
def _match(p_SRV, draft_SM, count_S, temperature_S, seed_S, anchor_S, accepted_S, token_SR, logprob_SR):
    sequences, rows, vocabulary = p_SRV.shape
    x_V, weight_V, words_W4 = _buffers(vocabulary)
    for s in range(sequences):
        accepted_S[s] = -1
        for r in range(rows):
            token_SR[s, r], logprob_SR[s, r] = -1, 0
            if accepted_S[s] < 0:
                top, total, lse = normalise(p_SRV[s, r], temperature_S[s], -1, x_V, weight_V)
                token = choose(x_V, weight_V, top, total, temperature_S[s], seed_S[s], anchor_S[s] + 1 + r, _NOISE, words_W4)
                token_SR[s, r], logprob_SR[s, r] = token, _F(np.float64(x_V[token]) - lse)
                if r >= count_S[s] or draft_SM[s, r] != token:
                    accepted_S[s] = r


@compiled()
def reject(call):
    """`verify_rejection` of a `Verification`."""
    sequences, rows, vocabulary, slots = call.sequences, call.rows, call.vocabulary, call.rows - 1
    excluded, mixed = call.excluded, call.mixed
    p_SRV, q_SMV = floats(call.p_at, (sequences, rows, vocabulary)), floats(call.q_at, (sequences, slots, vocabulary))
    q_lse_SM, draft_SM = doubles(call.q_lse_at, (sequences, slots)), integers(call.draft_at, (sequences, slots))
    count_S, seed_S = integers(call.count_at, sequences), integers(call.seed_at, sequences)
    anchor_S, mix_S = integers(call.anchor_at, sequences), doubles(call.mix_at, sequences)
    temperature_S = doubles(call.temperature_at, sequences)
    draft_temperature_S = doubles(call.draft_temperature_at, sequences)
    accepted_S, token_SR = integers(call.accepted_at, sequences), integers(call.token_at, (sequences, rows))
    logprob_SR, behavior_SR = floats(call.logprob_at, (sequences, rows)), floats(call.behavior_at, (sequences, rows))
    p_x_V, x_V = np.empty(vocabulary, _F), np.empty(vocabulary, _F)
    weight_V, q_V = np.empty(vocabulary, _F), np.empty(vocabulary, _F)
    for s in range(sequences):
        temperature, draft_temperature, seed = temperature_S[s], _F(draft_temperature_S[s]), seed_S[s]
        for r in range(rows):
            token_SR[s, r], logprob_SR[s, r], behavior_SR[s, r] = -1, 0, 0
        for r in range(rows):
            position, drafted, p_V = anchor_S[s] + 1 + r, r < count_S[s], p_SRV[s, r]
            _, _, p_lse = normalise(p_V, temperature, -1, p_x_V, weight_V)
            lse, mixes = p_lse, mixed and drafted
            if mixes:
                mix(p_V, q_SMV[s, r], mix_S[s], excluded, q_V)
                _, _, lse = normalise(q_V, temperature, -1, x_V, weight_V)
            target_V = x_V if mixes else p_x_V
            if drafted:
                token = draft_SM[s, r]
                logq = np.float64(q_SMV[s, r, token] / draft_temperature) - q_lse_SM[s, r]
                if token == excluded:
                    logq = -np.inf
                passes = uniform(seed, position, _ACCEPT) < np.exp(np.float64(target_V[token]) - lse - logq)
                if passes:
                    token_SR[s, r] = token
                    logprob_SR[s, r] = _F(np.float64(p_x_V[token]) - p_lse)
                    behavior_SR[s, r] = _F(np.float64(target_V[token]) - lse)
                    continue
            probabilities(target_V, lse, weight_V)
            left_V, left = weight_V, wide_total(weight_V, vocabulary)
            if drafted:
                residual(weight_V, q_SMV[s, r], draft_temperature, q_lse_SM[s, r], excluded, q_V)
                mass = wide_total(q_V, vocabulary)
                # No mass: p and q are equal to the last bit, and the rejection was rounding.
                if mass > 0:
                    left_V, left = q_V, mass
            token = draw(left_V, left, uniform(seed, position, _RESAMPLE))
            token_SR[s, r], accepted_S[s] = token, r
            logprob_SR[s, r] = _F(np.float64(p_x_V[token]) - p_lse)
            behavior_SR[s, r] = _F(np.float64(target_V[token]) - lse)
            break


@compiled()
def _logprobs(logits_NV, token_N, temperature_N, logprob_N):
    vocabulary = logits_NV.shape[1]
    x_V, weight_V = np.empty(vocabulary, _F), np.empty(vocabulary, _F)
    for n in range(logits_NV.shape[0]):
        _, _, lse = normalise(logits_NV[n], temperature_N[n], -1, x_V, weight_V)
        logprob_N[n] = _F(np.float64(x_V[token_N[n]]) - lse)


def _arrays(*tensors: torch.Tensor) -> list[np.ndarray]:
    """Contiguous arrays: numba would compile every function again for another layout."""
    return [tensor.contiguous().numpy() for tensor in tensors]


def _empty(*shape: int, like: type = np.int64) -> np.ndarray:
    return np.empty(shape, like)


def sample_cdf(
    logits_SRV: torch.Tensor, temperature_S: torch.Tensor, seed_S: torch.Tensor, position_S: torch.Tensor,
    excluded: int = -1, purpose: int = Purpose.DRAFT,
) -> Sampled:  # fmt: skip
    """`reference.sample_cdf`, and with purpose NOISE `reference.sample_gumbel`."""
    shape = logits_SRV.shape[:2]
    out = _empty(*shape), _empty(*shape, like=np.float32), _empty(*shape, like=np.float64)
    _sample(*_arrays(logits_SRV.float(), temperature_S.double(), seed_S, position_S), excluded, int(purpose), *out)
    return Sampled(*map(torch.from_numpy, out))


sample_gumbel = partial(sample_cdf, purpose=Purpose.NOISE)


def draft_chain(
    logits_SMV: torch.Tensor, pair_VV: torch.Tensor, previous_S: torch.Tensor, count_S: torch.Tensor,
    temperature_S: torch.Tensor, seed_S: torch.Tensor, anchor_S: torch.Tensor, excluded: int, purpose: int,
    first_SRV: torch.Tensor | None = None, first_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As the package's, of a table of pairs."""
    into = torch.empty(logits_SMV.shape[:2], dtype=torch.int64), torch.empty(logits_SMV.shape[:2], dtype=torch.float64)
    keys = previous_S, count_S, temperature_S, seed_S, anchor_S
    chain, held = Chain.of(logits_SMV, pair_VV, *keys, excluded, purpose, first_SRV, first_scale, into)
    draw_chain(chain)
    del held
    return into


def verify_matching(
    p_logits_SRV: torch.Tensor, draft_SM: torch.Tensor, count_S: torch.Tensor, temperature_S: torch.Tensor,
    seed_S: torch.Tensor, anchor_S: torch.Tensor,
) -> Rejection:  # fmt: skip
    """As the package's."""
    s, r = p_logits_SRV.shape[:2]
    out = _empty(s), _empty(s, r), _empty(s, r, like=np.float32)
    _match(*_arrays(p_logits_SRV.float(), draft_SM, count_S, temperature_S.double(), seed_S, anchor_S), *out)
    accepted_S, token_SR, logprob_SR = map(torch.from_numpy, out)
    return Rejection(accepted_S, token_SR, logprob_SR, logprob_SR)


def verify_rejection(
    p_logits_SRV: torch.Tensor, q_logits_SMV: torch.Tensor, q_lse_SM: torch.Tensor, draft_SM: torch.Tensor,
    count_S: torch.Tensor, temperature_S: torch.Tensor, seed_S: torch.Tensor, anchor_S: torch.Tensor, excluded: int = -1,
    mix_weight_S: torch.Tensor | None = None, draft_temperature_S: torch.Tensor | None = None,
) -> Rejection:  # fmt: skip
    """As the package's."""
    out = Rejection.empty(*p_logits_SRV.shape[:2])
    keys = draft_SM, count_S, temperature_S, seed_S, anchor_S
    call, held = Verification.of(
        p_logits_SRV, q_logits_SMV, q_lse_SM, *keys, excluded, mix_weight_S, draft_temperature_S, out
    )  # fmt: skip
    reject(call)
    del held
    return out


def logprobs(logits_NV: torch.Tensor, token_N: torch.Tensor, temperature_N: torch.Tensor) -> torch.Tensor:
    """`reference.logprobs`."""
    out = _empty(len(token_N), like=np.float32)
    _logprobs(*_arrays(logits_NV.float(), token_N, temperature_N.double()), out)
    return torch.from_numpy(out)
