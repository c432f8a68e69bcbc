"""Fields that requests for tokens share, in OpenAI's and vLLM's names, and the sampling parameters that they say.

Invariants:
- What is no field is an error, and so is a value of another type: nothing is guessed, nothing is passed over.
- A field that is left out, or null, has the service's default (`sampling` of its configuration) or that of SamplingParams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ...rollout.params import SamplerName, SamplingParams
from ...rollout.types import RolloutRequest, Trajectory
from ...seeds import MAX_SEED
from .http_errors import HttpError
from .limits import check_entries
from .pieces import Piece, experts, finite_list, weight_versions
from .state import HttpState


class Body(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


class StreamOptions(Body):
    """What a stream holds beside tokens."""

    include_usage: bool = False


class GenerationBody(Body):
    """A request for samples."""

    model: str | None = Field(None, description="the served policy's name; none for whichever serves")
    n: int = Field(1, ge=1, description="samples per prompt")
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 or -1: every token")
    min_p: float | None = Field(None, ge=0, lt=1)
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="63 bits; none for another one per request")
    stop: str | list[str] | None = Field(None, description="strings that end a sample")
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0)
    logit_bias: dict[str, float] | None = Field(None, description="token id -> number")
    skip_special_tokens: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="not used")
    prompt_logprobs: int | None = Field(None, ge=0, description="log-probabilities of the prompt, and so many alternatives")
    logprob_token_ids: list[int] | None = Field(None, description="record these tokens, in place of the most probable ones")
    return_token_ids: bool = Field(False, description="token ids of prompt and completion")
    return_tokens_as_token_ids: bool = Field(False, description="log-probabilities name a token `token_id:7`, not by its text")
    return_weight_versions: bool = Field(False, description="which weight version made which tokens")
    cache_salt: str | None = Field(None, description="K/V is shared with requests of the same salt alone")
    priority: int = Field(0, description="requests with the least number go first")
    routed_experts: bool = Field(False, description="the expert that each layer chose for each row")
    sampler: SamplerName | None = None
    mix_weight: float | None = Field(None, ge=0, le=1, description="of sampler mixed")
    behavior_logprobs: bool = Field(False, description="log-probabilities under the distribution that was sampled from")
    tokens_per_forward: bool = False
    search: dict[str, Any] | None = Field(None, description="one answer per prompt, made of many samples: the fields of "
                                          "blockroll.SearchConfig")

    def check(self, state: HttpState, prompts: int) -> None:
        """Raises HttpError for another model, and for more samples or alternatives than one request may ask for."""
        check_model(self.model, state)
        most = state.options.max_samples
        if prompts * self.n > most:
            raise HttpError(400, f"n: {prompts} prompts of {self.n} samples are more than {most} (http.max_samples)", "n")
        for name in ("logprobs", "top_logprobs", "prompt_logprobs"):
            wanted, limit = getattr(self, name, None), state.options.max_logprobs
            if type(wanted) is int and wanted > limit:
                raise HttpError(400, f"{name}: {wanted} is more than {limit} (http.max_logprobs)", name)

    def params(self, state: HttpState, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """The parameters of each prompt. Raises RequestError.

        Args: logprobs: most probable tokens to record.
        """
        defaults = state.config.sampling
        given: dict[str, Any] = {
            "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p,
            "presence_penalty": self.presence_penalty, "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty, "mix_weight": self.mix_weight, "sampler": self.sampler,
            "stop": self.stop, "stop_token_ids": self.stop_token_ids, "prompt_logprobs": self.prompt_logprobs,
            "logprob_token_ids": self.logprob_token_ids, "max_tokens": max_tokens, "logprobs": logprobs or None,
            "logit_bias": None if self.logit_bias is None else _biases(self.logit_bias), "seed": self.seed}
        known: dict[str, Any] = {"sampler": defaults.sampler, "temperature": defaults.temperature,
                 "max_tokens": max(defaults.max_tokens, self.min_tokens)}  # fmt: skip
        known |= {name: value for name, value in given.items() if value is not None}
        return SamplingParams(
            n=self.n, min_tokens=self.min_tokens, ignore_eos=self.ignore_eos, routed_experts=self.routed_experts,
            include_stop_str_in_output=self.include_stop_str_in_output, **known)

    def requests(self, state: HttpState, prompts: Sequence[tuple[int, ...]], params: SamplingParams) -> list[RolloutRequest]:
        """One request per prompt. Raises RequestError, and HttpError where the answer may be too large."""
        check_entries(params, prompts)
        return [RolloutRequest(state.dispatch.new_id(), prompt, params, priority=self.priority, cache_salt=self.cache_salt or "")
                for prompt in prompts]

    def extensions(self, piece: Piece, end: Trajectory | None) -> dict[str, Any]:
        """The fields beyond OpenAI's of a piece of a sample; `end`: the sample, where the piece ends it."""
        found: dict[str, Any] = {}
        if self.return_token_ids:
            found["token_ids"] = list(piece.tokens)
        if self.behavior_logprobs:
            found["behavior_logprobs"] = finite_list(piece.behavior_logprobs)
        if end is not None:
            found["stop_reason"] = end.stop_reason
            if self.return_weight_versions:
                found["weight_versions"] = weight_versions(end)
            if self.routed_experts:
                found["routed_experts"] = experts(end)
            if self.tokens_per_forward:
                found["tokens_per_forward"] = end.tokens_per_forward
        return found


def check_model(model: str | None, state: HttpState) -> None:
    """Raises HttpError for a model that is not the policy."""
    if model is not None and model != state.policy:
        raise HttpError(404, f"model: {model[:200]!r} is not served; use {state.policy!r}", "model", "model_not_found")


def _biases(given: dict[str, float]) -> dict[int, float]:
    found = {}
    for token, bias in given.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 12):
            raise HttpError(400, f"logit_bias: {token[:40]!r} is no token id; give {{\"7\": 1.5}}", "logit_bias")
        found[int(token)] = bias
    return found
