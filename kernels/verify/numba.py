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

from ..addresses import addresses, doubles, flat, floats, integers
from ..compiled import compiled, wide_total
from ..philox.numba import uniform
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
def _chain(sequences, slots, vocabulary, logits_at, pair_at, known, first_at, first_stride, first_scale, previous_at, count_at,
           seed_at, anchor_at, temperature_at, token_at, lse_at, excluded, purpose):  # fmt: skip
    logits_SMV, pair_VV = floats(logits_at, (sequences, slots, vocabulary)), floats(pair_at, (vocabulary, vocabulary))
    first_N = floats(first_at, (sequences - 1) * first_stride + vocabulary)
    previous_S, count_S = integers(previous_at, sequences), integers(count_at, sequences)
    seed_S, anchor_S = integers(seed_at, sequences), integers(anchor_at, sequences)
    temperature_S = doubles(temperature_at, sequences)
    token_SM, lse_SM = integers(token_at, (sequences, slots)), doubles(lse_at, (sequences, slots))
    x_V, weight_V, words_W4 = _buffers(vocabulary)
    scale = _F(first_scale)
    for s in range(sequences):
        previous = previous_S[s]
        for k in range(slots):
            token_SM[s, k], lse_SM[s, k] = -1, 0
            if k < count_S[s]:
                logits_V = logits_SMV[s, k]
                if known and k == 0:
                    first_V = first_N[s * first_stride : s * first_stride + vocabulary]
                    for v in range(vocabulary):
                        logits_V[v] = first_V[v] * scale
                else:
                    for v in range(vocabulary):
                        logits_V[v] += pair_VV[previous, v]
                logits_V[excluded] = -np.inf
                top, total, lse = normalise(logits_V, temperature_S[s], -1, x_V, weight_V)
                previous = choose(x_V, weight_V, top, total, temperature_S[s], seed_S[s], anchor_S[s] + 1 + k, purpose, words_W4)
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
def _reject(sequences, rows, vocabulary, first_stride, apart, p_at, later_at, q_at, draft_at, count_at, seed_at, anchor_at,
            q_lse_at, temperature_at, draft_temperature_at, mix_at, accepted_at, token_at, logprob_at, behavior_at, excluded,
            mixed):  # fmt: skip
    slots, n = rows - 1, 0
    first_N, q_SMV = floats(p_at, (sequences - 1) * first_stride + vocabulary), floats(q_at, (sequences, slots, vocabulary))
    later_N = floats(later_at, sequences * rows * vocabulary)
    q_lse_SM, draft_SM = doubles(q_lse_at, (sequences, slots)), integers(draft_at, (sequences, slots))
    count_S, seed_S, anchor_S = integers(count_at, sequences), integers(seed_at, sequences), integers(anchor_at, sequences)
    temperature_S, draft_temperature_S = doubles(temperature_at, sequences), doubles(draft_temperature_at, sequences)
    mix_S = doubles(mix_at, sequences)
    accepted_S, token_SR = integers(accepted_at, sequences), integers(token_at, (sequences, rows))
    logprob_SR, behavior_SR = floats(logprob_at, (sequences, rows)), floats(behavior_at, (sequences, rows))
    p_x_V, x_V = np.empty(vocabulary, _F), np.empty(vocabulary, _F)
    weight_V, q_V = np.empty(vocabulary, _F), np.empty(vocabulary, _F)
    for s in range(sequences):
        temperature, draft_temperature, seed = temperature_S[s], _F(draft_temperature_S[s]), seed_S[s]
        for r in range(rows):
            token_SR[s, r], logprob_SR[s, r], behavior_SR[s, r] = -1, 0, 0
        # Rows after the first lie behind it, or apart: then only those of sequences with drafts.
        later = n * slots * vocabulary if apart else s * first_stride
        n += count_S[s] > 0
        for r in range(rows):
            position, drafted = anchor_S[s] + 1 + r, r < count_S[s]
            begin = later + (r - 1) * vocabulary
            p_V = later_N[begin : begin + vocabulary] if r > 0 else first_N[s * first_stride : s * first_stride + vocabulary]
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
    first_SRV: torch.Tensor | None = None, first_scale: float = 1.0, into: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As the package's, of a table of pairs."""
    assert logits_SMV.dtype == torch.float32 and logits_SMV.is_contiguous()
    (s, m, v), first = logits_SMV.shape, (False, 0, 0, first_scale)
    if into is None:
        into = torch.empty((s, m), dtype=torch.int64), torch.empty((s, m), dtype=torch.float64)
    if first_SRV is not None:
        if first_SRV.dtype != torch.float32 or first_SRV.stride(2) != 1:
            (first_SRV,) = flat(torch.float32, first_SRV)
        first = True, first_SRV.data_ptr(), first_SRV.stride(0), first_scale
    wide = flat(torch.int64, previous_S, count_S, seed_S, anchor_S) + flat(torch.float64, temperature_S)
    (pair_VV,) = flat(torch.float32, pair_VV)
    _chain(s, m, v, *addresses((logits_SMV, pair_VV)), *first, *addresses([*wide, *into]), excluded, int(purpose))
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
    mix_weight_S: torch.Tensor | None = None, draft_temperature_S: torch.Tensor | None = None, into: Rejection | None = None,
    later_NMV: torch.Tensor | None = None,
) -> Rejection:  # fmt: skip
    """As the package's."""
    (s, m), (_, have, v) = draft_SM.shape, p_logits_SRV.shape
    r, apart = m + 1, later_NMV is not None
    assert have == (1 if apart else r) and (later_NMV is None or later_NMV.shape[1] == m)
    mixed = mix_weight_S is not None
    out = Rejection.empty(s, r) if into is None else into
    if not mixed:  # then these are the same numbers
        out = Rejection(out.accepted_S, out.token_SR, out.logprob_SR, out.logprob_SR)
    p, q, *later = flat(torch.float32, p_logits_SRV, q_logits_SMV, *([later_NMV] if later_NMV is not None else []))
    logits_at = p.data_ptr(), later[0].data_ptr() if later else p.data_ptr() + p.itemsize * v, q.data_ptr()
    whole = flat(torch.int64, draft_SM, count_S, seed_S, anchor_S)
    drawn_S = temperature_S if draft_temperature_S is None else draft_temperature_S
    wide = flat(torch.float64, q_lse_SM, temperature_S, drawn_S, temperature_S if mix_weight_S is None else mix_weight_S)
    _reject(s, r, v, have * v, apart, *logits_at, *addresses([*whole, *wide, *out]), excluded, mixed)
    return out


def logprobs(logits_NV: torch.Tensor, token_N: torch.Tensor, temperature_N: torch.Tensor) -> torch.Tensor:
    """`reference.logprobs`."""
    out = _empty(len(token_N), like=np.float32)
    _logprobs(*_arrays(logits_NV.float(), token_N, temperature_N.double()), out)
    return torch.from_numpy(out)
