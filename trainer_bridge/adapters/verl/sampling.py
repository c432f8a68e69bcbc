"""verl's sampling parameters as ours, and trajectories in the form of verl's `TokenOutput`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....errors import RequestError
from ....model.arguments import short
from ....rollout.params import SamplerName, SamplingParams
from ....rollout.types import Trajectory

_SAME = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "ignore_eos", "seed",
         "stop", "stop_token_ids", "min_tokens")  # fmt: skip
"""Names that mean the same here. A value of None is left out."""
_LENGTHS = ("max_tokens", "max_new_tokens")
"""vLLM's and SGLang's names of the longest answer."""


def sampling_params(given: Mapping[str, Any], sampler: SamplerName, longest: int) -> SamplingParams:
    """Sampling parameters from those of verl's agent loops.

    Args:
        given: as an agent loop gives them to `generate`. `logprobs` is taken and ignored: log-probabilities always come back.
        longest: tokens of an answer where `given` names no number; a greater number is cut to it.

    Raises RequestError for a parameter that has no meaning here, and for a value out of range.
    """
    fields = dict(given)
    fields.pop("logprobs", None)
    lengths = [fields.pop(name) for name in _LENGTHS if name in fields]
    top_k = fields.pop("top_k", None)
    taken = {name: fields.pop(name) for name in _SAME if name in fields}
    if fields.pop("n", 1) != 1:
        raise RequestError("sampling_params.n", "more than one sample of a call", "set rollout.n; verl makes a call per sample")
    for name, value in fields.items():
        if value is not None:
            raise RequestError(f"sampling_params.{name}"[:80], "not supported", "leave it out")
    wanted = lengths[0] if lengths and lengths[0] is not None else longest
    if not isinstance(wanted, int) or wanted < 1:
        raise RequestError("sampling_params.max_tokens", f"{short(wanted)} is no whole number from 1",
                           "ask for at least one token")
    if isinstance(taken.get("stop_token_ids"), list):
        taken["stop_token_ids"] = tuple(taken["stop_token_ids"])
    return SamplingParams(sampler=sampler, max_tokens=min(wanted, longest), top_k=-1 if top_k is None else top_k,
                          **{name: value for name, value in taken.items() if value is not None})


def longest_answer(prompt: int, prompt_length: int, response_length: int, max_model_len: int | None) -> int:
    """Tokens an answer may have: verl's budgets for prompt, answer and both.

    Raises RequestError where a prompt leaves no room for a token.
    """
    room = (max_model_len or prompt_length + response_length) - prompt
    if room < 1:
        raise RequestError("prompt_ids", f"{prompt} tokens leave no room for an answer",
                           "raise rollout.prompt_length or rollout.max_model_len, or filter long prompts")
    return max(1, min(response_length, prompt_length + response_length - prompt, room))


def token_output(trajectory: Trajectory, steps: Mapping[int, int]) -> dict[str, Any]:
    """The fields of a `TokenOutput`.

    `log_probs` are those of the distribution that each token was drawn from, which verl's rollout correction needs.
    `extra_fields["blockroll"]` has `policy_logprobs` (under p at the temperature), `weight_versions` and `tokens_per_forward`: a
    dictionary, because verl cannot collect lists of one length.

    Args:
        steps: verl's global step by weight version.
    """
    made = [steps[int(version)] for version in trajectory.versions]
    extra: dict[str, Any] = {
        "blockroll": {"policy_logprobs": trajectory.logprobs.tolist(), "weight_versions": trajectory.versions.tolist(),
                      "tokens_per_forward": trajectory.tokens_per_forward},
    }  # fmt: skip
    if made:
        extra |= {"global_steps": made[-1], "min_global_steps": min(made), "max_global_steps": max(made)}
    return {
        "token_ids": list(trajectory.tokens),
        "log_probs": trajectory.behavior_logprobs.tolist(),
        "stop_reason": "aborted" if trajectory.finish_reason == "abort" else "completed",
        "num_preempted": 0,
        "extra_fields": extra,
    }
