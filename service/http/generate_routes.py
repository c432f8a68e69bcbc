"""Token in, token out: vLLM's `/inference/v1/generate`, and SkyRL's variant with routed experts."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field

from ...rollout.params import SamplingParams
from ...rollout.types import Trajectory
from .generation import check_model, generate, room_behind, version_spans
from .http_errors import HttpError
from .routes import ApiRoute
from .sampling_fields import vllm_params
from .state import HttpState, state_of

router = APIRouter(route_class=ApiRoute, tags=["Trainers: tokens"])
State = Annotated[HttpState, Depends(state_of)]


class GenerateRequest(BaseModel):
    """A prompt as token ids. The fields without a meaning here must have the value that means none."""

    model_config = ConfigDict(extra="forbid")

    token_ids: list[int] = Field(min_length=1, description="the prompt")
    sampling_params: dict[str, Any] = Field(default_factory=dict, description="in vLLM's names, and ours: sampler, mix_weight, "
                                            "routed_experts")
    model: str | None = None
    request_id: str | None = Field(None, min_length=1, max_length=256, description="a name, by which it may be aborted")
    cache_salt: str | None = Field(None, description="K/V is reused among requests of one salt alone")
    priority: int = Field(0, description="of the requests that wait, those with the least number go first")
    stream: Literal[False] | None = False
    return_token_ids: bool | None = None
    features: None = None
    content_parts: None = None
    kv_transfer_params: None = None


@router.post("/inference/v1/generate")
async def generate_tokens(body: GenerateRequest, state: State) -> dict[str, Any]:
    """Samples of one prompt, with log-probabilities and the weight version of every token."""
    params, found = await _run(body, state)
    first = found[0]
    answer: dict[str, Any] = {
        "request_id": body.request_id or first.request_id, "model": state.policy, "weight_version": str(state.version),
        "choices": [_choice(sample, params) for sample in found],
        "prompt_logprobs": _prompt_logprobs(first), "usage": _usage(body, found)}  # fmt: skip
    if body.return_token_ids:
        answer["prompt_token_ids"] = body.token_ids
    return answer


@router.post("/skyrl/v1/generate")
async def generate_with_experts(body: GenerateRequest, state: State) -> dict[str, Any]:
    """As `/inference/v1/generate`, for one sample, with the routed experts as nested lists."""
    body.sampling_params["routed_experts"] = True
    params, found = await _run(body, state)
    choices = [_choice(sample, params) for sample in found]
    for choice, sample in zip(choices, found, strict=True):
        experts = sample.routed_experts
        choice["routed_experts"] = None if experts is None else experts[:, :, None].tolist()
    return {"choices": choices}


async def _run(body: GenerateRequest, state: HttpState) -> tuple[SamplingParams, list[Trajectory]]:
    check_model(state, body.model)
    room = room_behind(state, body.token_ids, "token_ids")
    params = vllm_params(body.sampling_params, room)
    if params.max_tokens > room and "max_tokens" in body.sampling_params:
        raise HttpError(400, f"sampling_params.max_tokens: {params.max_tokens} tokens do not fit behind the prompt; {room} do",
                        "sampling_params.max_tokens", "context_length_exceeded")
    return params, await generate(state, body.token_ids, params, body.request_id)


def _choice(sample: Trajectory, params: SamplingParams) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": sample.sample, "token_ids": sample.tokens, "finish_reason": sample.finish_reason,
        "stop_reason": sample.stop_reason, "logprobs": None, "weight_versions": version_spans(sample), "routed_experts": experts_of(sample),
        "behavior_logprobs": sample.behavior_logprobs.tolist(), "tokens_per_forward": sample.tokens_per_forward}  # fmt: skip
    if params.logprobs is not None:
        content = [_entry(token, logprob) for token, logprob in zip(sample.tokens, sample.logprobs.tolist(), strict=True)]
        if sample.top_tokens is not None and sample.top_logprobs is not None:
            for entry, tokens, logprobs in zip(content, sample.top_tokens.tolist(), sample.top_logprobs.tolist(), strict=True):
                entry["top_logprobs"] = [_entry(*pair) for pair in zip(tokens, logprobs, strict=True)]
        choice["logprobs"] = {"content": content}
    return choice


def _entry(token: int, logprob: float) -> dict[str, Any]:
    return {"token": f"token_id:{token}", "token_id": token, "logprob": logprob, "bytes": None, "top_logprobs": []}


def experts_of(sample: Trajectory) -> dict[str, Any] | None:
    """The experts of every row but the last token's, as compact bytes: prime-rl's form. Shape (rows, layers, 1)."""
    if sample.routed_experts is None:
        return None
    rows = sample.routed_experts[:, :, None]
    dtype = np.uint8 if not rows.size or (rows.min() >= 0 and rows.max() < 256) else np.int16
    return {"data": base64.b64encode(np.ascontiguousarray(rows, dtype).tobytes()).decode(), "shape": list(rows.shape), "start": 0,
            "dtype": np.dtype(dtype).name}


def _prompt_logprobs(sample: Trajectory) -> list[dict[str, Any] | None] | None:
    """Per prompt token a map from token id to log-probability: the token's own first, then the most probable ones; vLLM's
    form."""
    if sample.prompt_logprobs is None:
        return None
    rows: list[dict[str, Any] | None] = [None]
    for place, (token, logprob) in enumerate(zip(sample.prompt_tokens[1:], sample.prompt_logprobs.tolist(), strict=True)):
        row = {str(token): {"logprob": logprob}}
        if sample.prompt_top_tokens is not None and sample.prompt_top_logprobs is not None:
            top = zip(sample.prompt_top_tokens[place].tolist(), sample.prompt_top_logprobs[place].tolist(), strict=True)
            row |= {str(other): {"logprob": value, "rank": rank} for rank, (other, value) in enumerate(top, 1)}
        rows.append(row)
    return rows


def _usage(body: GenerateRequest, found: list[Trajectory]) -> dict[str, int]:
    made = sum(len(sample.tokens) for sample in found)
    return {"prompt_tokens": len(body.token_ids), "completion_tokens": made, "total_tokens": len(body.token_ids) + made}
