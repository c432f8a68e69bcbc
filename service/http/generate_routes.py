"""Token in, token out: vLLM's `/inference/v1/generate`, and SkyRL's variant with routed experts."""

from __future__ import annotations

import base64
import time
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from ...rollout.params import SamplingParams
from ...rollout.types import Trajectory
from .generation import generate
from .http_errors import HttpError
from .pieces import finite_list, prompt_logprobs, weight_versions
from .request_fields import check_model
from .routes import ApiRoute
from .sample_streams import json_response
from .sampling_fields import vllm_params
from .state import HttpState, state_of
from .text import check_prompt

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
async def generate_tokens(body: GenerateRequest, request: Request, state: State) -> Response:
    """Samples of one prompt, with log-probabilities and the weight version of every token."""
    params, found = await _run(body, request, state)
    made = sum(len(sample.tokens) for sample in found)
    answer: dict[str, Any] = {
        "request_id": body.request_id or found[0].request_id, "model": state.policy, "created": int(time.time()),
        "choices": [_choice(sample, params) for sample in found], "prompt_logprobs": prompt_logprobs(found[0], state.tokenizer),
        "usage": {"prompt_tokens": len(body.token_ids), "completion_tokens": made, "total_tokens": len(body.token_ids) + made}}
    if body.return_token_ids:
        answer["prompt_token_ids"] = body.token_ids
    return json_response(answer)


@router.post("/skyrl/v1/generate")
async def generate_with_experts(body: GenerateRequest, request: Request, state: State) -> Response:
    """As `/inference/v1/generate`, with the routed experts as nested lists (rows, layers, 1)."""
    body.sampling_params["routed_experts"] = True
    params, found = await _run(body, request, state)
    choices = [_choice(sample, params) for sample in found]
    for choice, sample in zip(choices, found, strict=True):
        experts = sample.routed_experts
        choice["routed_experts"] = None if experts is None else experts[:, :, None].tolist()
    return json_response({"choices": choices})


async def _run(body: GenerateRequest, request: Request, state: HttpState) -> tuple[SamplingParams, list[Trajectory]]:
    check_model(body.model, state)
    prompt = check_prompt(state, body.token_ids, "token_ids")
    room = state.sizes.positions - len(prompt)
    params = vllm_params(body.sampling_params, room, state.config.sampling.sampler)
    if params.max_tokens > room:
        raise HttpError(400, f"sampling_params.max_tokens: {params.max_tokens} tokens do not fit behind the prompt; {room} do",
                        "sampling_params.max_tokens", "context_length_exceeded")
    return params, await generate(request, state, prompt, params, body.request_id, body.cache_salt or "", body.priority)


def _choice(sample: Trajectory, params: SamplingParams) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": sample.sample, "token_ids": sample.tokens, "finish_reason": sample.finish_reason,
        "stop_reason": sample.stop_reason, "logprobs": None, "weight_versions": weight_versions(sample),
        "routed_experts": packed_experts(sample), "behavior_logprobs": finite_list(sample.behavior_logprobs.tolist()),
        "tokens_per_forward": sample.tokens_per_forward}  # fmt: skip
    if params.logprobs is not None:
        content = [_entry(*pair) for pair in zip(sample.tokens, finite_list(sample.logprobs.tolist()), strict=True)]
        if sample.top_tokens is not None and sample.top_logprobs is not None:
            for entry, tokens, logprobs in zip(content, sample.top_tokens.tolist(), sample.top_logprobs.tolist(), strict=True):
                entry["top_logprobs"] = [_entry(*pair) for pair in zip(tokens, finite_list(logprobs), strict=True)]
        choice["logprobs"] = {"content": content}
    return choice


def _entry(token: int, logprob: float) -> dict[str, Any]:
    return {"token": f"token_id:{token}", "token_id": token, "logprob": logprob, "bytes": None, "top_logprobs": []}


def packed_experts(sample: Trajectory) -> dict[str, Any] | None:
    """The experts of every row but the last token's, as compact bytes: prime-rl's form. Shape (rows, layers, 1)."""
    if sample.routed_experts is None:
        return None
    rows = sample.routed_experts[:, :, None]
    dtype = np.uint8 if not rows.size or (rows.min() >= 0 and rows.max() < 256) else np.int16
    return {"data": base64.b64encode(np.ascontiguousarray(rows, dtype).tobytes()).decode(), "shape": list(rows.shape),
            "start": 0, "dtype": np.dtype(dtype).name}
