"""Pauses, aborted requests and weight versions, in vLLM's names."""

from __future__ import annotations

import base64
import binascii
import os
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Depends
from pydantic import BaseModel, ConfigDict, Field

from .http_errors import HttpError
from .routes import ApiRoute, ControlRoute
from .state import HttpState, state_of
from .weight_chunks import Tensor

router = APIRouter(route_class=ControlRoute, tags=["Trainers: control"])
info_router = APIRouter(route_class=ApiRoute, tags=["Trainers: control"])
State = Annotated[HttpState, Depends(state_of)]
InFlight = Literal["finish", "keep", "recompute", "abort"]
MAX_NAMES, MAX_PATH = 65_536, 4096
"""Request names of one call, and characters of a path."""


class Chunk(BaseModel):
    """Parts of tensors: lists of equal length. `data` is base64; `offsets` are bytes, 0 by default."""

    model_config = ConfigDict(extra="forbid")

    names: list[str] = Field(max_length=4096)
    dtype_names: list[str]
    shapes: list[list[int]]
    data: list[str]
    offsets: list[Annotated[int, Field(ge=0)]] | None = None


class WeightUpdate(BaseModel):
    """A directory that the service can read, or a chunk of an update that was started."""

    model_config = ConfigDict(extra="forbid")

    weight_dir: str | None = Field(None, min_length=1, max_length=MAX_PATH,
                                   description="holds model.safetensors, or shards and their index")
    update_info: Chunk | None = None
    weight_version: str | int | None = Field(None, description="the number of the version; the next one by default")
    in_flight: InFlight | None = Field(None, description="what happens to unfinished samples; keep by default")


def version_number(given: str | int | None) -> int | None:
    """A weight version as a number. Raises HttpError for another text."""
    text = str(given)
    if given is None:
        return None
    if not text.isascii() or not text.isdecimal() or len(text) > 10 or int(text) >= 2**31:
        raise HttpError(400, f"weight version {text[:40]!r} is no whole number below 2**31; versions count up", "weight_version")
    return int(text)


@router.post("/pause")
async def pause(state: State, mode: Literal["abort", "wait", "keep"] = "abort", clear_cache: bool = True,
                wait_for_inflight_requests: bool = False) -> dict[str, str]:
    """Pauses; answers when no engine makes a step. `keep` holds what runs and queues new requests; `wait` lets what runs finish,
    `abort` ends it, and both answer new requests with 503. `clear_cache` forgets K/V kept for other requests, but with `keep`."""
    mode = "wait" if wait_for_inflight_requests else mode
    await state.trainer.pause(mode, reset_cache=clear_cache and mode != "keep", refuse=mode != "keep")
    return {"status": "paused"}


@router.post("/resume")
async def resume(state: State) -> dict[str, str]:
    """Ends the pause."""
    await state.trainer.resume()
    return {"status": "resumed"}


@router.post("/abort_requests")
async def abort_requests(
    state: State, request_ids: Annotated[list[str] | None, Body(embed=True, max_length=MAX_NAMES)] = None,
) -> dict[str, Any]:
    """Ends requests where they are, by `request_id`; all of them without a list. They are answered with the tokens that they
    have and the finish reason `abort`."""
    ids = None if request_ids is None else state.names.ids(request_ids)
    await state.trainer.abort(ids)
    return {"status": "aborted", "aborted": None if ids is None else len(ids)}


@router.post("/reset_prefix_cache")
async def reset_prefix_cache(
    state: State, reset_running_requests: Annotated[bool, Body(embed=True)] = False,
) -> dict[str, str]:
    """Has the engines forget K/V that they keep for other requests. Running ones keep theirs."""
    if reset_running_requests:
        raise HttpError(400, "reset_running_requests: running requests keep their K/V; update the weights with "
                        "in_flight=recompute to prefill them again", "reset_running_requests")
    await state.trainer.reset_prefix_cache()
    return {"status": "ok"}


@router.post("/start_weight_update")
async def start_weight_update(state: State) -> dict[str, str]:
    """Begins an update whose tensors follow as chunks."""
    await state.trainer.start_chunks()
    return {"message": "Weight update started"}


@router.post("/update_weights")
async def update_weights(body: WeightUpdate, state: State) -> dict[str, Any]:
    """Makes the weights of a directory those that serve; or takes a chunk."""
    if (body.weight_dir is None) == (body.update_info is None):
        raise HttpError(400, "give weight_dir, or update_info of an update that was started", "weight_dir")
    if body.update_info is not None:
        state.trainer.add_chunk(_tensors(body.update_info))
        return {"message": "Weights updated", "status": "ok"}
    directory = check_directory(body.weight_dir, "weight_dir")
    version = await state.trainer.load(directory, version_number(body.weight_version), body.in_flight)
    return {"message": "Weights updated", "status": "ok", "weight_version": str(version)}


@router.post("/finish_weight_update")
async def finish_weight_update(
    state: State, weight_version: Annotated[str | int | None, Body(embed=True)] = None,
    in_flight: Annotated[InFlight | None, Body(embed=True)] = None,
) -> dict[str, str]:
    """Makes the tensors that came those that serve, or none of them."""
    version = await state.trainer.finish_chunks(version_number(weight_version), in_flight)
    return {"message": "Weight update finished", "weight_version": str(version)}


@router.post("/update_weight_version")
async def update_weight_version(
    state: State, new_version: Annotated[str | int, Body(embed=True)],
    abort_all_requests: Annotated[bool, Body(embed=True)] = False,
) -> dict[str, Any]:
    """Gives the weights that serve a greater number. Nothing ends by that. `abort_all_requests` ends what runs afterwards, so a
    number that is refused ends nothing."""
    number = version_number(new_version)
    assert number is not None
    version = await state.trainer.label(number)
    if abort_all_requests:
        await state.trainer.abort(None)
    return {"success": True, "message": f"Weight version updated to {version}", "new_version": str(version)}


@info_router.get("/is_paused")
async def is_paused(state: State) -> dict[str, Any]:
    """Whether generation is paused, and how."""
    return {"is_paused": bool(state.trainer.paused), "mode": state.trainer.paused or None}


@info_router.get("/weight_info")
async def weight_info(state: State) -> dict[str, str]:
    """The weight version that serves."""
    return {"weight_version": await served_version(state)}


@info_router.get("/get_world_size")
async def get_world_size(state: State, include_dp: bool = True) -> dict[str, int]:
    """The number of engines; 1 without data parallelism, as each engine is one process."""
    status = await state.status()
    return {"world_size": len(status.engines) if include_dp else 1}


@info_router.get("/server_info")
@info_router.get("/get_server_info")
async def server_info(state: State, config_format: Literal["text", "json"] = "text") -> dict[str, Any]:
    """What trainers ask of a vLLM or SGLang server: sizes of its parallelism, and the policy."""
    status = await state.status()
    engines = max(1, len(status.engines))
    return {
        "model_path": state.config.policy, "served_model_name": state.policy, "weight_version": str(status.figures["version"]),
        "tp_size": 1, "pp_size": 1, "ep_size": 1, "moe_dp_size": 1, "dp_size": 1, "num_gpus": engines,
        "enable_memory_saver": False, "enable_return_routed_experts": True, "disaggregation_mode": "null",
        "context_length": state.sizes.positions,
        "vllm_config": {"weight_transfer_config": None, "model_config": {"model": state.config.policy,
                        "max_model_len": state.sizes.positions}, "parallel_config": {"world_size": engines}}}  # fmt: skip


async def served_version(state: HttpState) -> str:
    """The weight version that serves, as trainers read it."""
    return str((await state.status()).figures["version"])


def check_directory(path: str | None, field: str) -> str:
    """A path of a directory. Raises HttpError."""
    if not path or "\0" in path or not os.path.isabs(path):
        raise HttpError(400, f"{field}: {str(path)[:200]!r} is no absolute path; name a directory that the service can read",
                        field)
    return path


def _tensors(chunk: Chunk) -> list[Tensor]:
    offsets = chunk.offsets or [0] * len(chunk.names)
    if len({len(part) for part in (chunk.names, chunk.dtype_names, chunk.shapes, chunk.data, offsets)}) != 1:
        raise HttpError(400, "update_info: names, dtype_names, shapes, data and offsets differ in length", "update_info")
    try:
        data = [base64.b64decode(text, validate=True) for text in chunk.data]
    except (binascii.Error, ValueError):
        raise HttpError(400, "update_info.data: an entry is no base64", "update_info.data") from None
    return [Tensor(*each) for each in zip(
        chunk.names, chunk.dtype_names, map(tuple, chunk.shapes), offsets, data, strict=True)]
