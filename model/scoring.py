"""Log-probabilities of given tokens by one causal pass: what a trainer recomputes, from nothing but the tokens.

Scoring runs on the backend that decodes the policy. On `backends.packed` the log-probabilities are those the engine records, to
the last bit, whatever else is scored beside them. On other backends they are the same up to rounding.

Legend: N scored tokens of a sequence, P prompt tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import Module

from ..errors import RequestError
from ..kernels.transfer import upload
from ..kernels.verify import logprobs
from .arguments import check_temperature, is_list, require, short, token_ids
from .backends import Backend, choose
from .layout import causal
from .packing import packs
from .vocabulary import rows_at_once

if TYPE_CHECKING:
    from .policy import Policy

_ROWS = 8192
"""Most rows of a pass, unless one sequence has more; sequences are packed up to it."""


@torch.inference_mode()
def score(
    policy: Policy,
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    temperature: float = 1.0,
) -> list[np.ndarray]:
    """log p of each completion token at `temperature` over the full vocabulary (0: at 1), float32[N] per sequence.

    Args:
        sequences: pairs (prompt tokens, completion tokens), each prompt with at least one token.

    Raises:
        RequestError: an empty prompt, a token outside the vocabulary, more tokens than the policy's maximum, or a temperature
            that is neither 0 nor in 1e-6..1e4.
    """
    sequences = checked_sequences(policy, sequences)
    check_temperature(temperature)
    backend = choose(policy)
    passes = packs(sequences, lambda pair: len(pair[0]) + len(pair[1]), _ROWS)
    scored = [scores for pack in passes for scores in _score_pack(backend, policy.config.vocab_size, pack, temperature)]
    for i, scores in enumerate(scored):
        require(bool(np.isfinite(scores).all()), "logprobs", f"those of sequence {i} are not finite",
                "use weights, and a dtype, that keep the policy's logits finite")
    return scored


def checked_sequences(
    policy: Policy, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The sequences as Python numbers. RequestError where `score` has one."""
    require(isinstance(policy, Module), "policy", f"{short(policy)} is no Policy", "give what load_policy returned")
    require(is_list(sequences) and all(is_list(pair) and len(pair) == 2 for pair in sequences), "sequences",
            f"{short(sequences)} is no list of pairs", "give (prompt tokens, completion tokens) of each sequence")
    limit, vocabulary = policy.config.max_position_embeddings, policy.config.vocab_size
    checked = [(token_ids(prompt, "prompt_tokens"), token_ids(tokens, "tokens")) for prompt, tokens in sequences]
    for i, (prompt, tokens) in enumerate(checked):
        if not prompt:
            raise RequestError("prompt_tokens", f"sequence {i} has an empty prompt", "give at least one token")
        if len(prompt) + len(tokens) > limit:
            raise RequestError("tokens", f"sequence {i} has {len(prompt) + len(tokens)} tokens, more than {limit}",
                               "score it with a policy of a longer context")  # fmt: skip
        if max((*prompt, *tokens)) >= vocabulary:
            raise RequestError("tokens", f"sequence {i} holds a token outside 0..{vocabulary - 1}",
                               "use the policy's own tokenizer")  # fmt: skip
    return checked


def _score_pack(
    backend: Backend, vocabulary: int, pack: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float
) -> list[np.ndarray]:
    texts = [[*prompt, *tokens] for prompt, tokens in pack]
    counts = [len(tokens) for _, tokens in pack]
    ends = np.cumsum([len(prompt) + len(tokens) for prompt, tokens in pack])
    rows = np.concatenate([np.arange(end - n - 1, end - 1) for end, n in zip(ends, counts, strict=True)])
    layout, plan = backend.prepare(causal(texts))
    index = upload(torch.from_numpy(rows), layout.token_T.device)
    hidden_TD = backend.forward(layout, plan)
    target_N = layout.token_T[index + 1]
    temperature_1 = torch.full((1,), float(temperature), dtype=torch.float64, device=index.device)
    at_once = rows_at_once(vocabulary, 3, index.device)
    parts = [
        logprobs(backend.head(hidden_TD[some]), target, temperature_1.expand(len(target)))
        for some, target in zip(index.split(at_once), target_N.split(at_once), strict=True)
    ]
    return np.split(torch.cat(parts).float().cpu().numpy(), np.cumsum(counts)[:-1])
