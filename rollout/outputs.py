"""What `Engine.generate` returns: one RolloutOutput per prompt, with its samples. vLLM's names for the same things work too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .types import FinishReason, RolloutRequest, Trajectory


@dataclass(frozen=True, slots=True)
class SampleOutput:
    """One sample of a prompt.

    Attributes:
        trajectory: everything recorded of the sample.
        text: the generated text, cut at the stop string that ended it; None where the policy has no tokenizer.
    """

    trajectory: Trajectory
    text: str | None

    @property
    def index(self) -> int:
        """Number of the sample, from 0."""
        return self.trajectory.sample

    @property
    def tokens(self) -> list[int]:
        """Generated token ids, the one that ended the sample included."""
        return self.trajectory.tokens

    token_ids = tokens

    @property
    def logprobs(self) -> np.ndarray:
        """float32[N], log p of each token at the sampling temperature (`Trajectory.logprobs`)."""
        return self.trajectory.logprobs

    @property
    def cumulative_logprob(self) -> float:
        """Sum of `logprobs`."""
        return float(self.trajectory.logprobs.sum(dtype=np.float64))

    @property
    def top_logprobs(self) -> list[dict[int, float]] | None:
        """At each token the k most probable tokens and the token itself, as {token id: log-probability}; None unless
        SamplingParams.logprobs is at least 1."""
        sample = self.trajectory
        if sample.top_tokens is None or sample.top_logprobs is None:
            return None
        return _alternatives(sample.top_tokens, sample.top_logprobs, sample.tokens, sample.logprobs)

    @property
    def finish_reason(self) -> FinishReason:
        """`stop` (a stop token or a stop string) or `length`."""
        return self.trajectory.finish_reason

    @property
    def stop_reason(self) -> int | str | None:
        """The stop string, or the id of the stop token, that ended the sample."""
        return self.trajectory.stop_reason

    @property
    def tokens_per_forward(self) -> float:
        """Generated tokens over decode forwards."""
        return self.trajectory.tokens_per_forward


@dataclass(frozen=True, slots=True)
class RolloutOutput:
    """What became of one prompt.

    Attributes:
        request_id: name of the request.
        prompt: the prompt's text, where it was given as text.
        prompt_tokens: its token ids.
        samples: in order, `n` of them.
    """

    request_id: str
    prompt: str | None
    prompt_tokens: tuple[int, ...]
    samples: list[SampleOutput]

    @property
    def outputs(self) -> list[SampleOutput]:
        """The samples."""
        return self.samples

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt's token ids, as a list."""
        return list(self.prompt_tokens)

    @property
    def prompt_logprobs(self) -> np.ndarray | None:
        """float32[P - 1], log p of the prompt tokens from the second on, if SamplingParams.prompt_logprobs asks for it."""
        return self.samples[0].trajectory.prompt_logprobs

    @property
    def prompt_top_logprobs(self) -> list[dict[int, float]] | None:
        """At each prompt token from the second on the k most probable tokens and the token itself."""
        sample = self.samples[0].trajectory
        if sample.prompt_logprobs is None or sample.prompt_top_tokens is None or sample.prompt_top_logprobs is None:
            return None
        return _alternatives(sample.prompt_top_tokens, sample.prompt_top_logprobs, self.prompt_tokens[1:], sample.prompt_logprobs)


def _alternatives(
    top_NK: np.ndarray, logprob_NK: np.ndarray, tokens: Sequence[int], logprobs: np.ndarray
) -> list[dict[int, float]]:
    columns = zip(top_NK.tolist(), logprob_NK.tolist(), tokens, logprobs.tolist(), strict=True)
    return [dict(zip(top, values, strict=True)) | {token: logprob} for top, values, token, logprob in columns]


def as_outputs(
    requests: Sequence[RolloutRequest], texts: Sequence[str | None], trajectories: Sequence[Trajectory], tokenizer: Any
) -> list[RolloutOutput]:
    """One output per request, in order. `trajectories`: all samples, in the order of the requests, then of the samples."""
    left = iter(trajectories)
    return [
        RolloutOutput(request.id, text, request.prompt_tokens, [
            SampleOutput(sample, None if tokenizer is None else sample.text(tokenizer))
            for sample in (next(left) for _ in range(request.samples))
        ])
        for request, text in zip(requests, texts, strict=True)
    ]  # fmt: skip
