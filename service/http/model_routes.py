"""/v1/models."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from .http_errors import HttpError
from .routes import ApiRoute
from .state import HttpState, state_of

router = APIRouter(prefix="/v1", route_class=ApiRoute, tags=["OpenAI"])
State = Annotated[HttpState, Depends(state_of)]


@router.get("/models")
async def models(state: State) -> dict[str, Any]:
    """The policy that serves."""
    return {"object": "list", "data": [_model(state)]}


@router.get("/models/{name:path}")
async def model(name: str, state: State) -> dict[str, Any]:
    """One model."""
    if name != state.policy:
        raise HttpError(404, f"model {name[:200]!r} is not served; use {state.policy!r}", "model", "model_not_found")
    return _model(state)


def _model(state: HttpState) -> dict[str, Any]:
    return {"id": state.policy, "object": "model", "created": state.created, "owned_by": "blockroll",
            "root": state.config.policy, "parent": None, "max_model_len": state.sizes.positions,
            "weight_version": state.version}
