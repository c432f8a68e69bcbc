"""Log-probabilities of given tokens by one causal pass: what a trainer recomputes, from nothing but the tokens.

A policy that decodes through `PackedForward` is scored through it: the log-probabilities are then those the engine records, to
the last bit, whatever else is scored beside them. Those of other policies are the same up to rounding.

Legend: N scored tokens of a sequence, P prompt tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import RequestError
from ..kernels.transfer import upload
from ..kernels.verify import logprobs
from .layout import causal
from .packed import packed_forward
from .policy import Policy
from .vocabulary import rows_at_once

if TYPE_CHECKING:
    from .packed.forward import PackedForward

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
        RequestError: an empty prompt, a token outside the vocabulary, or more tokens than the policy's maximum.
    """
    check_sequences(policy, sequences)
    packed = packed_forward(policy)
    scores: list[np.ndarray] = []
    pack: list[tuple[Sequence[int], Sequence[int]]] = []
    held = 0
    for pair in sequences:
        length = len(pair[0]) + len(pair[1])
        if pack and held + length > _ROWS:
            scores += _score_pack(policy, packed, pack, temperature)
            pack, held = [], 0
        pack.append(pair)
        held += length
    return scores + (_score_pack(policy, packed, pack, temperature) if pack else [])


def check_sequences(policy: Policy, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
    """RequestError where `score` has one."""
    limit, vocabulary = policy.config.max_position_embeddings, policy.config.vocab_size
    for i, (prompt, tokens) in enumerate(sequences):
        if not len(prompt):
            raise RequestError("prompt_tokens", f"sequence {i} has an empty prompt", "give at least one token")
        if len(prompt) + len(tokens) > limit:
            raise RequestError("tokens", f"sequence {i} has {len(prompt) + len(tokens)} tokens, more than {limit}",
                               "score it with a policy of a longer context")  # fmt: skip
        if max((*prompt, *tokens)) >= vocabulary or min((*prompt, *tokens)) < 0:
            raise RequestError("tokens", f"sequence {i} holds a token outside 0..{vocabulary - 1}",
                               "use the policy's own tokenizer")  # fmt: skip


def _score_pack(
    policy: Policy, packed: PackedForward | None, pack: list[tuple[Sequence[int], Sequence[int]]], temperature: float
) -> list[np.ndarray]:
    texts = [[*prompt, *tokens] for prompt, tokens in pack]
    layout = causal(texts)
    plan = policy.plan(layout) if packed is None else None
    counts = [len(tokens) for _, tokens in pack]
    ends = np.cumsum([len(prompt) + len(tokens) for prompt, tokens in pack])
    rows = np.concatenate([np.arange(end - n - 1, end - 1) for end, n in zip(ends, counts, strict=True)])
    layout, index = upload((layout, torch.from_numpy(rows)), policy.device)
    hidden_TD = policy(layout, plan=plan) if packed is None else packed(layout)
    head = policy.head if packed is None else packed.head
    target_N = layout.token_T[index + 1]
    temperature_1 = torch.full((1,), float(temperature), dtype=torch.float64, device=index.device)
    at_once = rows_at_once(policy.config.vocab_size, 3, index.device)
    parts = [
        logprobs(head(hidden_TD[some]), target, temperature_1.expand(len(target)))
        for some, target in zip(index.split(at_once), target_N.split(at_once), strict=True)
    ]
    return np.split(torch.cat(parts).float().cpu().numpy(), np.cumsum(counts)[:-1])
