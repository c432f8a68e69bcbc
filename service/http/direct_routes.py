"""Calls the routes that make samples without the layers that FastAPI puts around every route. These layers take as much time as
the rest of a request.

Invariant: a client cannot tell. Guards, validation, answers and errors are those of the same route under FastAPI, which serves
every other route, other methods of these, and the document.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from inspect import signature
from typing import get_type_hints

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.types import Receive, Scope, Send

from .error_handlers import error_answer, log_bug
from .routes import ApiRoute, BoundedRequest, Handler


class DirectRoutes:
    """The ASGI application around `app`: calls the direct ones of the routers' routes, and gives the others to `app`."""

    def __init__(self, app: FastAPI, routers: Sequence[APIRouter]) -> None:
        self._app = app
        self._calls = {route.path: route.guarded(_called(route.endpoint)) for router in routers for route in router.routes
                       if isinstance(route, ApiRoute) and is_direct(route)}  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = self._calls.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if call is None:
            await self._app(scope, receive, send)
            return
        scope["app"] = self._app
        request = Request(scope, receive)
        try:
            response = await call(request)
        except Exception as error:  # every kind has its answer, and a bug is logged
            response = error_answer(request, error)
        try:
            await response(scope, receive, send)
        except Exception as error:  # of a stream that has begun; uvicorn ends the connection
            log_bug(request, error)
            raise


def is_direct(route: ApiRoute) -> bool:
    """Whether a route takes a body, the request and the state, and makes its own Response."""
    hints = get_type_hints(route.endpoint)
    return ([*signature(route.endpoint).parameters] == ["body", "request", "state"] and route.methods == {"POST"}
            and issubclass(hints["body"], BaseModel) and hints["return"] is Response)


def _called(endpoint: Callable[..., Awaitable[Response]]) -> Handler:
    model: type[BaseModel] = get_type_hints(endpoint)["body"]

    async def call(request: BoundedRequest) -> Response:
        if not await request.body():
            raise RequestValidationError([{"type": "missing", "loc": ("body",), "msg": "Field required", "input": None}])
        try:
            body = model.model_validate(await request.json(), from_attributes=True)
        except ValidationError as error:
            raise RequestValidationError(error.errors(include_url=False)) from None
        return await endpoint(body, request, request.app.state.http)

    return call
