"""What `Engine(...)` and `Engine.generate(...)` are given, as policies, configurations and requests.

Invariant: everything is checked here or by `Engine.check` before anything is queued; errors name the prompt, `prompts[3]`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np
import torch

from ..errors import RequestError
from ..model.arguments import require, short, token_ids
from ..model.checkpoint import load_policy
from ..model.device import placement
from ..model.policy import Policy
from ..model.tokenizer import encode_chat, encode_prompt
from .cache import PagedCache
from .schedule import Schedule
from .types import RolloutRequest, SamplingParams

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message] | Mapping[str, Any] | RolloutRequest
Prompts = Prompt | Sequence[Prompt]
ConfigT = TypeVar("ConfigT")


def policy_of(policy: Policy | str | os.PathLike[str], device: str | torch.device | None, dtype: str | None) -> Policy:
    """The policy itself, or the one of a name or directory, loaded as `model.device.placement` says."""
    if isinstance(policy, Policy):
        require(device is None and dtype is None, "device" if device is not None else "dtype",
                "given with a policy that is loaded already", "leave it out, or give the policy's name or directory")
        return policy
    return load_policy(policy, *placement(device, dtype))


def with_options(config: ConfigT, options: Mapping[str, Any]) -> ConfigT:
    """The engine's configuration with some fields replaced; a schedule may be given by its kind."""
    require(is_dataclass(config) and not isinstance(config, type), "config", f"{short(config)} is no EngineConfig",
            "give EngineConfig(...), or its fields as options")
    known = [field.name for field in fields(config)]  # type: ignore[arg-type]
    for name in options:
        require(name in known, name, "the engine has no such option", f"use one of device, dtype, {', '.join(known)}")
    if isinstance(options.get("schedule"), str):
        options = {**options, "schedule": Schedule(options["schedule"])}
    return replace(config, **options) if options else config  # type: ignore[type-var]


def stop_tokens(params: SamplingParams, policy: Policy) -> frozenset[int]:
    """The tokens that end a sample."""
    return frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else {*policy.eos_token_ids})


def _check_params(request: RolloutRequest, policy: Policy) -> None:
    """Raise RequestError where the parameters do not fit the policy."""
    params, vocabulary = request.params, policy.config.vocab_size
    if params.stop:
        require(policy.tokenizer is not None, "stop", f"request {request.id!r} has stop strings, and the policy has no tokenizer",
                "use stop_token_ids, or save the tokenizer in the policy's directory")
    if params.logprob_token_ids:
        most = max(params.logprob_token_ids)
        require(len(params.logprob_token_ids) <= vocabulary, "logprob_token_ids",
                f"request {request.id!r} names {len(params.logprob_token_ids)} tokens and the vocabulary has {vocabulary}",
                "name each token once")
        require(most < vocabulary, "logprob_token_ids", f"request {request.id!r} names token {most} and the vocabulary has "
                f"{vocabulary}", "use the policy's own tokenizer")
    forbidden: set[int] = set()
    if params.logit_bias:
        biases = cast(tuple[tuple[int, float], ...], params.logit_bias)
        most = max(token for token, _ in biases)
        require(most < vocabulary, "logit_bias", f"request {request.id!r} names token {most} and the vocabulary has {vocabulary}",
                "use the policy's own tokenizer")
        forbidden = {token for token, bias in biases if bias == -np.inf}
        require(len(forbidden) < vocabulary, "logit_bias", f"request {request.id!r} forbids every token", "leave one out")
    if params.min_tokens:
        require(len(forbidden.union(stop_tokens(params, policy)).intersection(range(vocabulary))) < vocabulary, "min_tokens",
                f"request {request.id!r} has no token that does not end it", "leave a token out of stop_token_ids")


def longest(request: RolloutRequest, policy: Policy) -> int:
    """Most tokens a sample of the request may reach, prompt included."""
    return min(len(request.prompt_tokens) + request.params.max_tokens, policy.config.max_position_embeddings)


def _check_sizes(request: RolloutRequest, policy: Policy, cache: PagedCache) -> None:
    """Raise RequestError where the request does not fit the policy or the cache."""
    prompt, limit = request.prompt_tokens, longest(request, policy)
    most, vocabulary = policy.config.max_position_embeddings, policy.config.vocab_size
    # Messages are made only where there is an error: this runs for each request that arrives.
    if len(prompt) >= most:
        raise RequestError("prompt_tokens", f"request {request.id!r} has {len(prompt)} tokens and the policy's maximum is {most}",
                           f"shorten the prompt to at most {most - 1} tokens")  # fmt: skip
    if max(prompt) >= vocabulary:
        raise RequestError("prompt_tokens", f"request {request.id!r} holds token {max(prompt)} and the vocabulary has "
                           f"{vocabulary}",
                           "use the policy's own tokenizer")  # fmt: skip
    if cache.pages_for(limit) > cache.total_pages:
        raise RequestError("max_tokens", f"request {request.id!r} may need {limit} positions, more than the cache holds",
                           "raise the engine's `pages` or lower max_tokens")  # fmt: skip


def check_request(request: RolloutRequest, policy: Policy, cache: PagedCache) -> None:
    """Raise RequestError where an engine with this policy and cache cannot serve the request."""
    _check_sizes(request, policy, cache)
    _check_params(request, policy)


def as_requests(
    prompts: Prompts, params: SamplingParams | Sequence[SamplingParams] | None, policy: Policy, name: str
) -> tuple[list[RolloutRequest], list[str | None]]:
    """One request per prompt, called `name-0`, `name-1`, ..., and the texts of those prompts that were given as text."""
    require(_single(prompts) or isinstance(prompts, Sequence | np.ndarray), "prompts", f"{short(prompts)} is no list of prompts",
            "give texts, lists of token ids, chats or RolloutRequests")
    listed = [prompts] if _single(prompts) else list(cast(Sequence[Prompt], prompts))
    own = [isinstance(prompt, RolloutRequest) for prompt in listed]
    if params is not None and all(own) and own:
        raise RequestError("params", "given beside RolloutRequests", "set the parameters of each RolloutRequest")
    if params is None or isinstance(params, SamplingParams):
        each = [params or SamplingParams()] * len(listed)
    else:
        require(isinstance(params, Sequence), "params", f"{short(params)} is no SamplingParams", "give SamplingParams(...)")
        each = list(params)
        require(len(each) == len(listed), "params", f"{len(each)} for {len(listed)} prompts", "give one, or one per prompt")
    requests, texts = [], list[str | None]()
    for i, (prompt, chosen) in enumerate(zip(listed, each, strict=True)):
        if isinstance(prompt, RolloutRequest):
            requests.append(prompt)
            texts.append(None)
            continue
        require(isinstance(chosen, SamplingParams), "params", f"{short(chosen)} is no SamplingParams", "give SamplingParams(...)")
        text, tokens = _tokens(prompt, policy, f"prompts[{i}]")
        requests.append(RolloutRequest(f"{name}-{i}", tokens, chosen))
        texts.append(text)
    return requests, texts


def _single(prompts: Any) -> bool:
    """Whether this is one prompt and not a list of them."""
    if isinstance(prompts, str | Mapping | RolloutRequest):
        return True
    return isinstance(prompts, Sequence | np.ndarray) and len(prompts) > 0 and (_is_token(prompts[0]) or _is_message(prompts[0]))


def _is_token(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value


def _tokens(prompt: Any, policy: Policy, field: str) -> tuple[str | None, tuple[int, ...]]:
    """The text, if there is one, and the token ids of a prompt."""
    if isinstance(prompt, Mapping):  # vLLM's {"prompt": text} and {"prompt_token_ids": tokens}
        known = [name for name in ("prompt", "prompt_tokens", "prompt_token_ids") if name in prompt]
        require(len(known) == 1, field, f"has the keys {', '.join(map(str, prompt))}", "give one of prompt and prompt_tokens")
        prompt = prompt[known[0]]
    if isinstance(prompt, str):
        require(policy.tokenizer is not None, field, "is text, and the policy has no tokenizer", "give token ids")
        require(bool(prompt), field, "is empty", "give some text")
        return prompt, tuple(encode_prompt(policy.tokenizer, prompt))
    if isinstance(prompt, np.ndarray):
        prompt = prompt.tolist()
    require(isinstance(prompt, Sequence) and not isinstance(prompt, bytes), field, f"is a {type(prompt).__name__}",
            "give text, token ids, chat messages or a RolloutRequest")
    require(len(prompt) > 0, field, "is empty", "give at least one token")
    if all(map(_is_message, prompt)):
        return None, encode_chat(policy.tokenizer, prompt, field)
    return None, token_ids(prompt, field)
