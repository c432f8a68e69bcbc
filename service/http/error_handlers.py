"""Has an application answer every error in OpenAI's form.

Invariant: what a client sends never gives a status of 500. A 500 is a bug, and its traceback goes to the log.
"""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ...errors import BlockrollError
from .http_errors import HttpError, as_http_error, body_of

_log = logging.getLogger(__package__)


def add_handlers(app: FastAPI) -> None:
    """Has the application answer every error in this form."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return error_answer(request, error)

    for kind in (HttpError, BlockrollError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def error_answer(request: Request, error: Exception) -> JSONResponse:
    """The answer to a request that raised an error."""
    if isinstance(error, HttpError | BlockrollError):
        return _answer(as_http_error(error))
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        # The kind of a field that may be one of several follows its name in the location.
        param = next((str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")), None)
        message = f"{param or 'body'}: {first['msg']}"
        return _answer(HttpError(400, message, param, "unknown_field" if first["type"] == "extra_forbidden" else None))
    if isinstance(error, HTTPException):
        answer = _answer(HttpError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))
        answer.headers.update(error.headers or {})
        return answer
    log_bug(request, error)
    return _answer(HttpError(500, "the service failed; its log says why"))


def log_bug(request: Request, error: Exception) -> None:
    """Writes the traceback of an error that nobody expects."""
    _log.error("%s %s failed", request.method, request.url.path, exc_info=error)


def _answer(error: HttpError) -> JSONResponse:
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
    return JSONResponse(body_of(error), error.status, headers)
