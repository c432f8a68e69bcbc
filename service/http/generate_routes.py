"""Token in, token out: vLLM's `/inference/v1/generate`, and SkyRL's variant with routed experts."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from ...rollout.params import SamplingParams
from ...rollout.types import RolloutRequest, Trajectory
from .generation import generate, generate_pieces, prepared
from .http_errors import HttpError
from .pieces import Piece, finite_list, prompt_logprobs, weight_versions
from .request_fields import StreamOptions, check_model
from .routes import ApiRoute
from .sample_streams import MAY_STREAM, event_stream, json_response, usage
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
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    features: None = None
    content_parts: None = None
    kv_transfer_params: None = None


@router.post("/inference/v1/generate", responses=MAY_STREAM)
async def generate_tokens(body: GenerateRequest, request: Request, state: State) -> Response:
    """Samples of one prompt, with log-probabilities and the weight version of every token. A stream brings tokens as they are
    committed; what is known of whole samples alone comes with the last of them."""
    wanted = _request(body, state)
    if body.stream:
        return await event_stream(request, _chunks(body, state, wanted))
    found = await generate(request, state, wanted, body.request_id)
    answer = {
        **_head(body, state, wanted), "choices": [_whole(sample, wanted.params) for sample in found],
        "prompt_logprobs": prompt_logprobs(found[0], state.tokenizer),
        "usage": usage([body.token_ids], sum(len(sample.tokens) for sample in found))}  # fmt: skip
    if body.return_token_ids:
        answer["prompt_token_ids"] = body.token_ids
    return json_response(answer)


async def _chunks(body: GenerateRequest, state: HttpState, wanted: RolloutRequest) -> AsyncGenerator[dict[str, Any], None]:
    """The answer in pieces."""
    head, made = _head(body, state, wanted), 0
    async with aclosing(generate_pieces(state, wanted, body.request_id)) as found:
        async for number, piece, end in found:
            chunk = {**head, "choices": [_choice(number, piece, wanted.params, end)]}
            if end is not None and wanted.params.prompt_logprobs is not None:
                chunk["prompt_logprobs"] = prompt_logprobs(end, state.tokenizer)
            if body.return_token_ids and not made:
                chunk["prompt_token_ids"] = body.token_ids
            made += len(piece.tokens)
            yield chunk
    if body.stream_options is not None and body.stream_options.include_usage:
        yield {**head, "choices": [], "usage": usage([body.token_ids], made)}


def _head(body: GenerateRequest, state: HttpState, wanted: RolloutRequest) -> dict[str, Any]:
    return {"request_id": body.request_id or wanted.id, "model": state.policy, "created": int(time.time())}


@router.post("/skyrl/v1/generate")
async def generate_with_experts(body: GenerateRequest, request: Request, state: State) -> Response:
    """As `/inference/v1/generate`, with the routed experts as nested lists (rows, layers, 1)."""
    if body.stream:
        raise HttpError(400, "stream: this route answers whole; use /inference/v1/generate", "stream")
    body.sampling_params["routed_experts"] = True
    wanted = _request(body, state)
    found = await generate(request, state, wanted, body.request_id)
    choices = [_whole(sample, wanted.params) for sample in found]
    for choice, sample in zip(choices, found, strict=True):
        experts = sample.routed_experts
        choice["routed_experts"] = None if experts is None else experts[:, :, None].tolist()
    return json_response({"choices": choices})


def _request(body: GenerateRequest, state: HttpState) -> RolloutRequest:
    """What the body wants. Raises HttpError or RequestError."""
    check_model(body.model, state)
    prompt = check_prompt(state, body.token_ids, "token_ids")
    room = state.sizes.positions - len(prompt)
    params = vllm_params(body.sampling_params, room, state.config.sampling.sampler)
    if params.max_tokens > room:
        raise HttpError(400, f"sampling_params.max_tokens: {params.max_tokens} tokens do not fit behind the prompt; {room} do",
                        "sampling_params.max_tokens", "context_length_exceeded")
    return prepared(state, prompt, params, body.cache_salt or "", body.priority)


def _whole(sample: Trajectory, params: SamplingParams) -> dict[str, Any]:
    return _choice(sample.sample, Piece.of_trajectory(sample), params, sample)


def _choice(number: int, piece: Piece, params: SamplingParams, end: Trajectory | None) -> dict[str, Any]:
    """A piece of a sample; `end`: the sample, where the piece ends it."""
    choice: dict[str, Any] = {
        "index": number, "token_ids": piece.tokens, "finish_reason": None, "logprobs": None,
        "behavior_logprobs": finite_list(piece.behavior_logprobs)}  # fmt: skip
    if params.logprobs is not None:
        content = [_entry(*pair) for pair in zip(piece.tokens, finite_list(piece.logprobs), strict=True)]
        for entry, (tokens, logprobs) in zip(content, piece.top):
            entry["top_logprobs"] = [_entry(*pair) for pair in zip(tokens, finite_list(logprobs), strict=True)]
        choice["logprobs"] = {"content": content}
    if end is not None:
        choice |= {"finish_reason": end.finish_reason, "stop_reason": end.stop_reason, "weight_versions": weight_versions(end),
                   "routed_experts": packed_experts(end), "tokens_per_forward": end.tokens_per_forward}  # fmt: skip
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
