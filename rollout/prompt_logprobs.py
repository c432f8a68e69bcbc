"""Log-probabilities of a request's prompt (`SamplingParams.prompt_logprobs`): one causal pass per request, made when its first
sample ends, under the weights that serve then."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from ..model.logprobs import text_logits
from ..model.policy import Policy
from ..model.scoring import score
from .sampling.top import top_logprobs
from .types import RolloutRequest


class PromptScores(NamedTuple):
    """Of the prompt's tokens from the second on: float32[P - 1] log p, int32[P - 1, K] and float32[P - 1, K] the most probable
    tokens and theirs."""

    logprobs: np.ndarray
    top_tokens: np.ndarray
    top_logprobs: np.ndarray


class PromptLogprobs:
    """What the samples of one request share. `scores` is computed when it is first read."""

    def __init__(self, policy: Policy, request: RolloutRequest) -> None:
        self._policy, self._request = policy, request

    @cached_property
    def scores(self) -> PromptScores:
        """By the convention of `Trajectory.logprobs`."""
        prompt, params = self._request.prompt_tokens, self._request.params
        k = min(params.prompt_logprobs or 0, self._policy.config.vocab_size)
        if len(prompt) == 1:
            return PromptScores(np.zeros(0, np.float32), np.zeros((0, k), np.int32), np.zeros((0, k), np.float32))
        (known,) = score(self._policy, [(prompt[:1], prompt[1:])], params.temperature)
        if not k:
            nothing = np.zeros((len(known), 0))
            return PromptScores(known, nothing.astype(np.int32), nothing.astype(np.float32))
        temperature = torch.full((1,), params.temperature, dtype=torch.float64, device=self._policy.device)
        parts = []
        for logits_RV in text_logits(self._policy, prompt).split(256):
            parts.append([x.cpu() for x in top_logprobs(logits_RV, temperature.expand(len(logits_RV)), k)])
        token, logprob = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
        # A token of the prompt has the very number that `logprobs` gives it.
        same = token == np.array(prompt[1:])[:, None]
        return PromptScores(known, token.astype(np.int32), np.where(same, known[:, None], logprob).astype(np.float32))
