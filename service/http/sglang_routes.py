"""SGLang's names for generation, pauses and weight versions, as far as slime uses them."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from ...rollout.types import RolloutRequest, Trajectory
from .areal_routes import answered
from .control_routes import MAX_NAMES, MAX_PATH, check_directory, served_version, version_number
from .generation import generate, generate_pieces, prepared
from .health_routes import health
from .http_errors import HttpError
from .pieces import finite_list, weight_versions
from .routes import ApiRoute, ControlRoute
from .sample_streams import MAY_STREAM, event_stream, json_response
from .sampling_fields import sglang_params
from .state import HttpState, state_of
from .text import TextStream, check_prompt, encode, whole_text

router = APIRouter(route_class=ApiRoute, tags=["Trainers: SGLang"])
control_router = APIRouter(route_class=ControlRoute, tags=["Trainers: SGLang"])
State = Annotated[HttpState, Depends(state_of)]
_PAUSES: dict[str, tuple[Literal["abort", "keep"], str]] = {
    "abort": ("abort", "keep"), "in_place": ("keep", "keep"), "retract": ("keep", "recompute")}
"""SGLang's modes: ours, and what a weight update does to held samples."""


class SglangRequest(BaseModel):
    """One prompt, as text or token ids."""

    model_config = ConfigDict(extra="forbid")

    input_ids: list[int] | None = Field(None, min_length=1)
    text: str | None = None
    sampling_params: dict[str, Any] = Field(default_factory=dict)
    rid: str | None = Field(None, min_length=1, max_length=256)
    return_logprob: bool = False
    logprob_start_len: int | None = None
    return_text_in_logprobs: bool = False
    return_routed_experts: bool = False
    stream: bool = Field(False, description="each event has what there is of a sample so far")
    image_data: None = None


class Pause(BaseModel):
    """How to pause."""

    model_config = ConfigDict(extra="forbid")

    mode: Literal["abort", "in_place", "retract"] = "abort"


class Abort(BaseModel):
    """Which requests to abort."""

    model_config = ConfigDict(extra="forbid")

    rid: str | list[str] | None = Field(None, max_length=MAX_NAMES)
    abort_all: bool = False


class DiskUpdate(BaseModel):
    """Weights from a directory."""

    model_config = ConfigDict(extra="forbid")

    model_path: str = Field(min_length=1, max_length=MAX_PATH)
    load_format: str | None = None
    weight_version: str | int | None = None
    abort_all_requests: bool = False
    flush_cache: bool = True


@router.post("/generate", responses=MAY_STREAM)
async def sglang_generate(body: SglangRequest, request: Request, state: State) -> Response:
    """One sample of a prompt, or a list of them where `n` is above 1."""
    begin = time.monotonic()
    if (body.input_ids is None) == (body.text is None):
        raise HttpError(400, "give input_ids or text", "input_ids")
    given = body.input_ids if body.text is None else await encode(state, body.text, "text")
    prompt = check_prompt(state, given or (), "input_ids")
    params = sglang_params(body.sampling_params | {"routed_experts": body.return_routed_experts},
                           state.sizes.positions - len(prompt), state.config.sampling.sampler)
    wanted = prepared(state, prompt, params)
    if body.stream:
        return await event_stream(request, _events(body, state, wanted, begin))
    answers = []
    for sample in await generate(request, state, wanted, body.rid):
        so_far = _SoFar(sample.tokens, sample.logprobs.tolist(), sample.versions.tolist())
        answers.append(_answer(body, state, wanted, so_far, whole_text(state.tokenizer, sample), sample, begin))
    return json_response(answers[0] if params.n == 1 else answers)


@dataclass
class _SoFar:
    """What there is of a sample. `told`: how many tokens the last event had."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    told: int = 0


async def _events(
    body: SglangRequest, state: HttpState, wanted: RolloutRequest, begin: float
) -> AsyncGenerator[dict[str, Any], None]:
    """What there is of a sample, as often as it has grown by a 64th: the events of a long one are 64 times as long as itself,
    and not their square."""
    texts: dict[int, TextStream] = {}
    samples: dict[int, _SoFar] = {}
    held = [] if wanted.params.include_stop_str_in_output else list(wanted.params.stop)
    async with aclosing(generate_pieces(state, wanted, body.rid)) as found:
        async for number, piece, end in found:
            text = texts.setdefault(number, TextStream(state.tokenizer, held, True))
            so_far = samples.setdefault(number, _SoFar())
            so_far.tokens += piece.tokens
            so_far.logprobs += piece.logprobs
            so_far.versions += piece.versions
            text.push(piece.tokens) if end is None else text.finish(whole_text(state.tokenizer, end))
            if end is None and len(so_far.tokens) - so_far.told <= so_far.told // 64:
                continue
            so_far.told = len(so_far.tokens)
            answer = _answer(body, state, wanted, so_far, text.emitted, end, begin)
            yield answer if wanted.params.n == 1 else {**answer, "index": number}


def _answer(
    body: SglangRequest, state: HttpState, wanted: RolloutRequest, so_far: _SoFar, text: str, end: Trajectory | None, begin: float
) -> dict[str, Any]:  # fmt: skip
    """What there is of a sample; `end`: the sample, where that is all."""
    version = so_far.versions[-1] if so_far.versions else state.version
    meta: dict[str, Any] = {
        "id": body.rid or wanted.id, "finish_reason": None if end is None else _finish_reason(end),
        "prompt_tokens": len(wanted.prompt_tokens), "completion_tokens": len(so_far.tokens), "cached_tokens": 0,
        "weight_version": str(version)}  # fmt: skip
    if body.return_logprob:
        meta["output_token_logprobs"] = [[logprob, token, None] for logprob, token in
                                         zip(finite_list(so_far.logprobs), so_far.tokens, strict=True)]
    if end is not None:
        meta |= {"weight_versions": weight_versions(end), "e2e_latency": time.monotonic() - begin}
        if end.routed_experts is not None:
            meta["routed_experts"] = base64.b64encode(np.ascontiguousarray(end.routed_experts, "<i4").tobytes()).decode()
    return {"text": text, "output_ids": list(so_far.tokens), "meta_info": meta}


def _finish_reason(sample: Trajectory) -> dict[str, Any]:
    if sample.finish_reason == "length":
        return {"type": "length", "length": len(sample.tokens)}
    if sample.finish_reason == "stop":
        return {"type": "stop", "matched": sample.stop_reason}
    return {"type": "abort", "message": "the request was aborted", "status_code": None}


@router.get("/health_generate", response_class=Response)
async def health_generate(state: State) -> Response:
    """As `/health`."""
    return await health(state)


@router.get("/get_weight_version")
async def get_weight_version(state: State) -> dict[str, str]:
    """The weight version that serves."""
    return {"weight_version": await served_version(state)}


@router.get("/get_model_info")
async def get_model_info(state: State) -> dict[str, Any]:
    """The policy that serves."""
    return {"model_path": state.config.policy, "is_generation": True, "weight_version": await served_version(state)}


@router.get("/v1/loads")
async def loads(state: State, include: str = "core") -> dict[str, Any]:
    """Samples that are unfinished."""
    figures = (await state.status()).figures
    running, all_ = int(figures["in_flight"]), int(figures["outstanding"])
    return {"loads": [{"dp_rank": 0, "num_reqs": all_, "num_running_reqs": running, "num_waiting_reqs": max(0, all_ - running)}]}


@control_router.post("/update_weights_from_disk")
async def update_weights_from_disk(body: DiskUpdate, state: State) -> Any:
    """Makes the weights of a directory those that serve. K/V of other versions is never reused."""
    return await answered(lambda: state.trainer.load(
        check_directory(body.model_path, "model_path"), version_number(body.weight_version),
        "abort" if body.abort_all_requests else None))


@control_router.get("/flush_cache", response_class=PlainTextResponse)
@control_router.post("/flush_cache", response_class=PlainTextResponse)
async def flush_cache(state: State) -> Response:
    """Has the engines forget K/V that they keep for other requests."""
    await state.trainer.reset_prefix_cache()
    return PlainTextResponse("Cache flushed.\n")


@control_router.post("/pause_generation")
async def pause_generation(state: State, body: Pause | None = None) -> dict[str, str]:
    """Pauses, and queues new requests. `retract` has held samples prefilled again when the weights change."""
    mode, in_flight = _PAUSES[(body or Pause()).mode]
    await state.trainer.pause(mode, reset_cache=False, refuse=False, in_flight=in_flight)
    return {"message": "Generation paused successfully.", "status": "ok"}


@control_router.post("/continue_generation")
async def continue_generation(state: State) -> dict[str, str]:
    """Ends the pause."""
    await state.trainer.resume()
    return {"message": "Generation continued successfully.", "status": "ok"}


@control_router.post("/abort_request", response_class=Response)
async def abort_request(body: Abort, state: State) -> Response:
    """Ends requests where they are, by `rid`, or all. They are answered with the tokens that they have."""
    if not body.abort_all and not body.rid:
        raise HttpError(400, "give rid, or abort_all: true", "rid")
    names = [body.rid] if isinstance(body.rid, str) else body.rid
    await state.trainer.abort(None if body.abort_all else state.names.ids(names or []))
    return Response()
