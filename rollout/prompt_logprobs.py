"""Log-probabilities of a request's prompt (`SamplingParams.prompt_logprobs`): one causal pass per request, made when its first
sample ends, under the weights that serve then."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from ..kernels.verify import logprobs
from ..model.backends import Backend
from ..model.logprobs import text_logits
from ..model.policy import Policy
from ..model.vocabulary import rows_at_once
from .sampling.top import top_logprobs
from .types import RolloutRequest

_COPIES = 10
"""float32 values held per row and token: the logits, scaled ones, their log-softmax and its sorted copy in float64 (with its
input), and the sorted tokens in int64."""


class PromptScores(NamedTuple):
    """Of the prompt's tokens from the second on: float32[P - 1] log p, int32[P - 1, K] and float32[P - 1, K] the most probable
    tokens and theirs."""

    logprobs: np.ndarray
    top_tokens: np.ndarray
    top_logprobs: np.ndarray


class PromptLogprobs:
    """What the samples of one request share. `scores` is computed when it is first read."""

    def __init__(self, policy: Policy, backend: Backend, request: RolloutRequest) -> None:
        self._policy, self._backend, self._request = policy, backend, request

    @cached_property
    def scores(self) -> PromptScores:
        """By the convention of `Trajectory.logprobs`, and equal to those of `score` as the logprobs of samples are."""
        prompt, params, vocabulary = self._request.prompt_tokens, self._request.params, self._policy.config.vocab_size
        k = min(params.prompt_logprobs or 0, vocabulary)
        known, tokens, tops = [np.zeros(0, np.float32)], [np.zeros((0, k), np.int32)], [np.zeros((0, k), np.float32)]
        device = self._policy.device
        temperature_1 = torch.full((1,), params.temperature, dtype=torch.float64, device=device)
        at_once = rows_at_once(vocabulary, _COPIES if k else 3, device)
        for logits_RV, target_R in text_logits(self._backend, prompt, at_once) if len(prompt) > 1 else ():
            temperature_R = temperature_1.expand(len(target_R))
            logprob_R = logprobs(logits_RV, target_R, temperature_R).float()
            known.append(logprob_R.cpu().numpy())
            if k:
                token_RK, logprob_RK = top_logprobs(logits_RV, temperature_R, k)
                # A token of the prompt has the very number that `known` gives it.
                logprob_RK = torch.where(token_RK == target_R[:, None], logprob_R[:, None], logprob_RK)
                tokens.append(token_RK.int().cpu().numpy())
                tops.append(logprob_RK.cpu().numpy())
        if not k:
            nothing = np.zeros((len(prompt) - 1, 0))
            return PromptScores(np.concatenate(known), nothing.astype(np.int32), nothing.astype(np.float32))
        return PromptScores(np.concatenate(known), np.concatenate(tokens), np.concatenate(tops))
