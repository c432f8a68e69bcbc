"""Errors as OpenAI writes them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

from ...errors import ClusterError, InvalidInput, StorageError, TransportError

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
SCHEMA: dict[str, Any] = {
    "type": "object", "required": ["error"],
    "properties": {"error": {
        "type": "object", "required": ["message", "type", "param", "code"],
        "properties": {"message": {"type": "string"}, "type": {"type": "string"},
                       "param": {"type": ["string", "null"]}, "code": {"type": ["string", "integer", "null"]}}}},
}  # fmt: skip
"""JSON schema of an error's body."""


class HttpError(Exception):
    """An error with its HTTP status.

    Args:
        param: the field that is wrong. code: a word for programs, such as `model_not_found`.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        self.status, self.message, self.param, self.code = status, message, param, code
        super().__init__(message)


def client_gone() -> HttpError:
    """The answer to a client that has disconnected, for logs."""
    return HttpError(499, "the client has disconnected", code="client_closed_request")


def as_http_error(error: Exception) -> HttpError:
    """The HTTP form of an error of the tree. Any other one is raised."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, InvalidInput):
        return HttpError(400, str(error), error.field)
    if isinstance(error, TransportError | ClusterError):
        return HttpError(503, str(error), code="unavailable")
    if isinstance(error, StorageError):
        return HttpError(507, str(error), code="insufficient_storage")
    raise error


def body_of(error: HttpError) -> dict[str, Any]:
    """The object that a client is sent."""
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}
