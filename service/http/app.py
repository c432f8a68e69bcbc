"""The application: routers, errors and the document that describes them."""

from __future__ import annotations

from fastapi import FastAPI

from . import (
    areal_routes,
    chat,
    completions,
    control_routes,
    generate_routes,
    health_routes,
    model_routes,
    sglang_routes,
    token_routes,
)
from .error_handlers import add_handlers
from .http_errors import SCHEMA
from .state import HttpState

ROUTERS = (
    health_routes.router, model_routes.router, completions.router, chat.router, token_routes.router, generate_routes.router,
    control_routes.router, control_routes.info_router, areal_routes.router, sglang_routes.router, sglang_routes.control_router,
)  # fmt: skip


def create_app(state: HttpState) -> FastAPI:
    """The application of one service."""
    error = {"description": "The request cannot be served.", "content": {"application/json": {"schema": SCHEMA}}}
    app = FastAPI(title="blockroll", version="1", openapi_url=None, responses={"4XX": error, "5XX": error})
    app.state.http = state
    for router in ROUTERS:
        app.include_router(router)
    add_handlers(app)
    return app
