"""The application: routers, errors and the document that describes them."""

from __future__ import annotations

from fastapi import FastAPI

from . import health_routes, openai_routes
from .error_handlers import add_handlers
from .http_errors import SCHEMA
from .state import HttpState

ROUTERS = (health_routes.router, openai_routes.router)


def create_app(state: HttpState) -> FastAPI:
    """The application of one service."""
    error = {"description": "The request cannot be served.", "content": {"application/json": {"schema": SCHEMA}}}
    app = FastAPI(title="blockroll", version="1", docs_url=None, redoc_url=None, responses={"4XX": error, "5XX": error})
    app.state.http = state
    for router in ROUTERS:
        app.include_router(router)
    add_handlers(app)
    return app
