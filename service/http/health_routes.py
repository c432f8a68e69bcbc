"""Whether the service works, its metrics, and what its routes are."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response

from ..metrics import exposition
from .http_errors import HttpError
from .routes import ApiRoute
from .state import HttpState, state_of

router = APIRouter(route_class=ApiRoute, tags=["Health"])
State = Annotated[HttpState, Depends(state_of)]


@router.get("/health", response_class=Response)
async def health(state: State) -> Response:
    """200 and no body while the gateway answers and reports no trouble."""
    status = await state.status()
    if notice := status.figures.get("notice"):
        raise HttpError(503, str(notice), code="unavailable")
    return Response()


@router.get("/openapi.json", include_in_schema=False)
async def document(request: Request) -> dict[str, Any]:
    """The OpenAPI document of these routes."""
    app: FastAPI = request.app
    return app.openapi()


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(state: State) -> Response:
    """Prometheus metrics, as on the port of `metrics`."""
    status = await state.status()
    body, kind = await asyncio.to_thread(exposition, status)
    return Response(body, media_type=kind)
