"""AReaL's names for a pause, its end, and weights from a directory.

A failure is answered with `success: false` and a reason, beside OpenAI's form.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from ...errors import BlockrollError
from .control_routes import MAX_PATH, check_directory
from .http_errors import HttpError, as_http_error, body_of
from .routes import ControlRoute
from .state import HttpState, state_of

router = APIRouter(route_class=ControlRoute, tags=["Trainers: AReaL"])
State = Annotated[HttpState, Depends(state_of)]


class ArealUpdate(BaseModel):
    """Weights from a directory."""

    model_config = ConfigDict(extra="forbid")

    model_path: str = Field(min_length=1, max_length=MAX_PATH)
    load_format: str | None = "auto"
    abort_all_requests: bool = False


@router.post("/areal_pause_generation")
async def areal_pause_generation(state: State) -> dict[str, Any]:
    """Ends what runs, with the finish reason `abort`, and queues new requests."""
    await state.trainer.pause("abort", reset_cache=True, refuse=False)
    return {"success": True, "message": "Generation paused and all requests aborted"}


@router.post("/areal_continue_generation")
async def areal_continue_generation(state: State) -> dict[str, Any]:
    """Ends the pause."""
    await state.trainer.resume()
    return {"success": True, "message": "Generation continued"}


@router.post("/areal_update_weights")
async def areal_update_weights(body: ArealUpdate, state: State) -> Any:
    """Makes the weights of a directory those that serve. What runs ends, with the finish reason `abort`."""
    return await answered(lambda: state.trainer.load(check_directory(body.model_path, "model_path"), None, "abort"))


async def answered(load: Any) -> Any:
    """Calls a load; the answer says whether it succeeded."""
    try:
        version = await load()
    except (BlockrollError, HttpError) as error:
        known = as_http_error(error)
        return JSONResponse({"success": False, "message": known.message, **body_of(known)}, known.status)
    return {"success": True, "message": "Weights updated", "weight_version": str(version)}
