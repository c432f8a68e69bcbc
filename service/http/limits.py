"""The limit that several fields of a request make together. It is checked before anything is sampled."""

from __future__ import annotations

from collections.abc import Sequence

from ...rollout.params import SamplingParams
from .http_errors import HttpError

MAX_ENTRIES = 1 << 21
"""Tokens of all samples of one request, each counted once and once more per alternative whose log-probability is recorded. Such
an entry takes up to 440 bytes as a Python object and 110 as JSON, so one answer takes at most about 1.2 GB while it is written.
16 samples of 131,072 tokens fit, or 1,024 of 2,048."""


def check_entries(params: SamplingParams, prompts: Sequence[Sequence[int]]) -> None:
    """Raises HttpError where the answer to these prompts may have more entries than MAX_ENTRIES. A sample has its prompt, too."""
    generated = 1 + max(params.logprobs or 0, len(params.logprob_token_ids or ())) + params.routed_experts
    given = 1 + (0 if params.prompt_logprobs is None else params.prompt_logprobs + 1) + params.routed_experts
    entries = params.n * sum(len(prompt) * given + params.max_tokens * generated for prompt in prompts)
    if entries > MAX_ENTRIES:
        raise HttpError(
            400, f"max_tokens: {params.n * len(prompts)} samples of up to {params.max_tokens} tokens, with prompts and "
            f"alternatives, are {entries} entries of one answer and more than {MAX_ENTRIES}; lower max_tokens, n or logprobs, or "
            "send several requests", "max_tokens", "answer_too_large")  # fmt: skip
