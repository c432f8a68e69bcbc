"""Prompts, completions and rewards in TRL's forms."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import InvalidInput
from ...model.tokenizer import encode_prompt
from ...rollout.types import SamplingParams, Trajectory

Prompt = str | list[dict[str, Any]]
"""Text, or the messages of a conversation."""
_STD_EPS = 1e-8
"""TRL's AsyncGRPOTrainer adds this to a group's standard deviation."""


def prompt_tokens(tokenizer: Any, prompt: Prompt, template: Mapping[str, Any] | None = None) -> tuple[int, ...]:
    """Token ids of a prompt: text after the beginning-of-sequence token, or a conversation in the tokenizer's chat template."""
    if isinstance(prompt, str):
        return tuple(encode_prompt(tokenizer, prompt))
    found = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **(template or {}))
    return tuple(found["input_ids"])


def completion(tokenizer: Any, prompt: Prompt, tokens: Sequence[int]) -> Any:
    """A completion in the form of its prompt: text, or a list with the assistant's message."""
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def sampling_params(options: Any, sampler: Any) -> SamplingParams:
    """Sampling parameters from TRL's names.

    Args:
        options: an object with temperature, top_p, top_k, min_p, repetition_penalty and max_completion_length.
    """
    return SamplingParams(
        sampler=sampler, temperature=options.temperature, top_p=options.top_p, top_k=options.top_k or 0,
        min_p=options.min_p or 0.0, repetition_penalty=options.repetition_penalty, max_tokens=options.max_completion_length,
    )  # fmt: skip


def reward_fields(trajectories: Sequence[Trajectory]) -> dict[str, list[Any]]:
    """What reward functions are given beside the columns of the data set, an entry per sample.

    `policy_logprobs` and `behavior_logprobs`: log-probabilities of each token under p at the temperature, and under the
    distribution that it was drawn from. `weight_versions`: the weight version that made each token. `finish_reason`,
    `tokens_per_forward`.
    """
    return {
        "policy_logprobs": [t.logprobs.tolist() for t in trajectories],
        "behavior_logprobs": [t.behavior_logprobs.tolist() for t in trajectories],
        "weight_versions": [t.versions.tolist() for t in trajectories],
        "finish_reason": [t.finish_reason for t in trajectories],
        "tokens_per_forward": [t.tokens_per_forward for t in trajectories],
    }


def reward(function: Callable[..., Any], arguments: Mapping[str, Any], samples: int) -> np.ndarray:
    """Rewards of one function, float64 per sample; NaN where it returned None or NaN. Coroutine functions are run to their end.

    Raises InvalidInput for another number of rewards, and for an infinite one, whose group would have NaN for advantages.
    """
    found = function(**arguments)
    if inspect.isawaitable(found):
        found = asyncio.run(_awaited(found))
    if len(found) != samples:
        raise InvalidInput("reward_funcs", f"{name_of(function)} returned {len(found)} rewards for {samples} samples",
                           "return one reward per sample, or None")
    values = np.array([np.nan if value is None else value for value in found], dtype=float)
    if np.isinf(values).any():
        raise InvalidInput("reward_funcs", f"{name_of(function)} returned an infinite reward", "return a finite one, or None")
    return values


async def _awaited(found: Any) -> Any:
    return await found


def name_of(function: Callable[..., Any]) -> str:
    """The name a reward is logged under."""
    return getattr(function, "__name__", type(function).__name__)


def advantages(rewards_K: np.ndarray) -> np.ndarray:
    """Advantages of one group as TRL's AsyncGRPOTrainer computes them; 0 for a sample without a reward (NaN)."""
    scored = ~np.isnan(rewards_K)
    found = np.zeros_like(rewards_K)
    if scored.any():
        kept = rewards_K[scored]
        found[scored] = (kept - kept.mean()) / (kept.std() + _STD_EPS)
    return found
