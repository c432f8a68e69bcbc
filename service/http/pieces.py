"""Parts of samples as JSON: tokens, log-probabilities, versions. A piece is a whole sample, or what a stream adds to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from ...rollout.backend import Progress
from ...rollout.types import Trajectory
from .text import token_text

LEAST_LOGPROB = -9999.0
"""What stands for a log-probability of minus infinity, which JSON has no number for."""


@dataclass(frozen=True)
class Piece:
    """Some tokens of a sample, in order.

    Attributes:
        start: generated tokens before them.
        top: per token the alternatives (ids, log-probabilities); empty where none are recorded.
    """

    start: int
    tokens: Sequence[int]
    versions: Sequence[int]
    logprobs: Sequence[float]
    behavior_logprobs: Sequence[float]
    top: Sequence[tuple[Sequence[int], Sequence[float]]]

    @classmethod
    def of_trajectory(cls, trajectory: Trajectory, start: int = 0) -> Piece:
        """A finished sample from token `start` on."""
        top: list[tuple[list[int], list[float]]] = []
        if trajectory.top_tokens is not None and trajectory.top_logprobs is not None:
            top = list(zip(trajectory.top_tokens[start:].tolist(), trajectory.top_logprobs[start:].tolist(), strict=True))
        return cls(start, trajectory.tokens[start:], trajectory.versions[start:].tolist(), trajectory.logprobs[start:].tolist(),
                   trajectory.behavior_logprobs[start:].tolist(), top)  # fmt: skip

    @classmethod
    def of_progress(cls, progress: Progress, start: int) -> Piece:
        """What is reported of an unfinished sample, from token `start` on."""
        skip = start - progress.start
        return cls(start, progress.tokens[skip:], progress.versions[skip:], progress.logprobs[skip:],
                   progress.behavior_logprobs[skip:], progress.top[skip:])  # fmt: skip


def weight_versions(trajectory: Trajectory) -> list[dict[str, int]]:
    """Runs of tokens by the weight version that made them: [{version, start, end}], `end` exclusive."""
    spans, start = [], 0
    for version, run in groupby(trajectory.versions.tolist()):
        end = start + len(list(run))
        spans.append({"version": version, "start": start, "end": end})
        start = end
    return spans


def experts(trajectory: Trajectory) -> list[list[int]] | None:
    """The expert of each row and layer."""
    return None if trajectory.routed_experts is None else trajectory.routed_experts.tolist()


def prompt_logprobs(trajectory: Trajectory, tokenizer: Any) -> list[dict[str, Any] | None] | None:
    """vLLM's form: nothing for the first token, then per token {id: {logprob, rank, decoded_token}} of it and the alternatives.
    The rank of a token that is not among the alternatives is null."""
    if trajectory.prompt_logprobs is None:
        return None
    nothing = np.zeros((len(trajectory.prompt_logprobs), 0))
    tops = zip(nothing if trajectory.prompt_top_tokens is None else trajectory.prompt_top_tokens,
               nothing if trajectory.prompt_top_logprobs is None else trajectory.prompt_top_logprobs, strict=True)  # fmt: skip
    found: list[dict[str, Any] | None] = [None]
    rows = zip(trajectory.prompt_tokens[1:], trajectory.prompt_logprobs.tolist(), tops, strict=True)
    for token, logprob, (ids, values) in rows:
        ranked = enumerate(zip(ids.tolist(), values.tolist(), strict=True), 1)
        entry = {str(other): _ranked(tokenizer, other, value, rank) for rank, (other, value) in ranked}
        entry.setdefault(str(token), _ranked(tokenizer, token, logprob, None))
        found.append(entry)
    return found


def completion_logprobs(piece: Piece, tokenizer: Any, as_ids: bool, offset: int) -> dict[str, Any]:
    """The form of /v1/completions. `offset`: characters of the text before the piece."""
    texts = [token_text(tokenizer, token) for token in piece.tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    top = piece.top or [([], [])] * len(piece.tokens)
    return {
        "tokens": [f"token_id:{token}" for token in piece.tokens] if as_ids else texts,
        "token_logprobs": [_finite(value) for value in piece.logprobs],
        "top_logprobs": [
            {token_text(tokenizer, other, as_ids): _finite(value) for other, value in [*zip(ids, values), (token, logprob)]}
            for token, logprob, (ids, values) in zip(piece.tokens, piece.logprobs, top, strict=True)],
        "text_offset": offsets,
    }  # fmt: skip


def chat_logprobs(piece: Piece, tokenizer: Any, as_ids: bool) -> dict[str, Any]:
    """The form of /v1/chat/completions."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = token_text(tokenizer, token)
        return {"token": f"token_id:{token}" if as_ids else text, "logprob": _finite(logprob), "bytes": list(text.encode())}

    top = piece.top or [([], [])] * len(piece.tokens)
    return {"content": [
        entry(token, logprob) | {"top_logprobs": [entry(other, value) for other, value in zip(ids, values)]}
        for token, logprob, (ids, values) in zip(piece.tokens, piece.logprobs, top, strict=True)], "refusal": None}  # fmt: skip


def finite_list(values: Sequence[float]) -> list[float]:
    """Log-probabilities as JSON can hold them."""
    return [_finite(value) for value in values]


def _finite(value: float) -> float:
    return max(value, LEAST_LOGPROB)


def _ranked(tokenizer: Any, token: int, logprob: float, rank: int | None) -> dict[str, Any]:
    decoded = None if tokenizer is None else token_text(tokenizer, token)
    return {"logprob": _finite(logprob), "rank": rank, "decoded_token": decoded}
