"""Reads sampling parameters as trainers send them, in vLLM's names and in SGLang's.

A field that changes nothing here is ignored. One that would change the sample, and that this service cannot serve, is refused by
name, unless it has the value that means none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ...rollout.params import SamplerName, SamplingParams
from .http_errors import HttpError

_OWN = {field.name for field in fields(SamplingParams)} - {"logits_processors"}
_WITHOUT_EFFECT = frozenset({
    "detokenize", "skip_special_tokens", "spaces_between_special_tokens", "output_kind", "flat_logprobs", "extra_args",
    "skip_clone", "skip_reading_prefix_cache", "routed_experts_prompt_start"})  # fmt: skip
"""They say how an answer is written, or which cache may be used."""
_SGLANG = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed",
           "no_stop_trim": "include_stop_str_in_output"}  # fmt: skip


def vllm_params(given: Mapping[str, Any], room: int, sampler: SamplerName) -> SamplingParams:
    """Parameters of `/inference/v1/generate`.

    Args: room: tokens that fit behind the prompt; the default of `max_tokens`. sampler: the service's default.

    Raises HttpError or RequestError that names the field.
    """
    return _params(given, {"max_tokens": max(1, room), "sampler": sampler})


def sglang_params(given: Mapping[str, Any], room: int, sampler: SamplerName) -> SamplingParams:
    """Parameters of SGLang's `/generate`; as `vllm_params`. SGLang's own default of `max_new_tokens` is 128."""
    named = {_SGLANG.get(name, name): value for name, value in given.items()}
    return _params(named, {"max_tokens": max(1, min(128, room)), "sampler": sampler})


def _params(given: Mapping[str, Any], defaults: dict[str, Any]) -> SamplingParams:
    found = dict(defaults)
    for name, value in given.items():
        if name in _WITHOUT_EFFECT or value is None:
            continue
        if name not in _OWN:
            if value is True or value not in (False, 0, 1.0, "", [], {}) or name == "":  # True equals 1, and means something
                raise HttpError(400, f"sampling_params.{name[:100]}: this service cannot serve it; leave it out",
                                f"sampling_params.{name[:100]}", "unsupported_parameter")
            continue
        found[name] = _plain(name, value)
    return SamplingParams(**found)


def _plain(name: str, value: Any) -> Any:
    if name == "logit_bias" and isinstance(value, dict):
        try:
            return {int(token): bias for token, bias in value.items()}
        except ValueError:
            raise HttpError(400, "sampling_params.logit_bias: its keys are no token ids", "sampling_params.logit_bias") from None
    if name in ("stop", "stop_token_ids") and isinstance(value, list):
        return tuple(value)
    return float(value) if name in ("temperature", "top_p", "min_p") and type(value) is int else value
