"""Log-probabilities of given tokens by one causal pass: what a trainer recomputes, from nothing but the tokens.

Scoring runs on the backend that decodes the policy. On `backends.packed` the log-probabilities are those the engine records, to
the last bit, whatever else is scored beside them. On other backends they are the same up to rounding.

Legend: N scored tokens of a sequence, P prompt tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

Column = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits_NV, targets_N, temperatures_N) -> one number per row."""
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
    return _scored(policy, sequences, temperature, [logprobs])[0]


@torch.inference_mode()
def score_with_entropy(
    policy: Policy, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float = 1.0
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What `score` gives, and the entropy of p where each completion token was drawn, in nats, float32[N] per sequence.

    Raises: as `score`.
    """
    scored, entropies = _scored(policy, sequences, temperature, [logprobs, _entropy])
    return scored, entropies


def _entropy(logits_NV: torch.Tensor, _: torch.Tensor, temperature_N: torch.Tensor) -> torch.Tensor:
    logp_NV = torch.log_softmax(logits_NV.double() / torch.where(temperature_N > 0, temperature_N, 1.0)[:, None], dim=-1)
    return -(logp_NV.exp() * logp_NV).sum(-1)


def _scored(
    policy: Policy, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float, columns: Sequence[Column]
) -> list[list[np.ndarray]]:
    """Per column its values, float32[N] per sequence."""
    sequences = checked_sequences(policy, sequences)
    check_temperature(temperature)
    backend = choose(policy)
    passes = packs(sequences, lambda pair: len(pair[0]) + len(pair[1]), _ROWS)
    made: list[list[np.ndarray]] = [[] for _ in columns]
    for pack in passes:
        for whole, part in zip(made, _score_pack(backend, policy.config.vocab_size, pack, temperature, columns), strict=True):
            whole += part
    for i, scores in enumerate(made[0]):
        require(bool(np.isfinite(scores).all()), "logprobs", f"those of sequence {i} are not finite",
                "use weights, and a dtype, that keep the policy's logits finite")
    return made


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
    backend: Backend,
    vocabulary: int,
    pack: Sequence[tuple[Sequence[int], Sequence[int]]],
    temperature: float,
    columns: Sequence[Column],
) -> list[list[np.ndarray]]:
    texts = [[*prompt, *tokens] for prompt, tokens in pack]
    counts = [len(tokens) for _, tokens in pack]
    ends = np.cumsum([len(prompt) + len(tokens) for prompt, tokens in pack])
    rows = np.concatenate([np.arange(end - n - 1, end - 1) for end, n in zip(ends, counts, strict=True)])
    layout, plan = backend.prepare(causal(texts))
    index = upload(torch.from_numpy(rows), layout.token_T.device)
    hidden_TD = backend.forward(layout, plan)
    target_N = layout.token_T[index + 1]
    temperature_1 = torch.full((1,), float(temperature), dtype=torch.float64, device=index.device)
    at_once = rows_at_once(vocabulary, 3 + 5 * (len(columns) - 1), index.device)  # entropy is summed in float64
    parts: list[list[torch.Tensor]] = [[] for _ in columns]
    for some, target in zip(index.split(at_once), target_N.split(at_once), strict=True):
        logits_NV = backend.head(hidden_TD[some])
        for part, column in zip(parts, columns, strict=True):
            part.append(column(logits_NV, target, temperature_1.expand(len(target))))
    return [np.split(torch.cat(part).float().cpu().numpy(), np.cumsum(counts)[:-1]) for part in parts]
