"""Errors of Ray, in one line."""

from __future__ import annotations

from ray.exceptions import RayError, RayTaskError

from ...errors import BlockrollError


def one_line(error: RayError) -> str:
    """What happened, without the traceback that Ray puts into the text."""
    cause = error.cause if isinstance(error, RayTaskError) else None
    if isinstance(cause, BlockrollError):
        return str(cause)
    if cause is not None:
        return f"{type(cause).__name__}: {' '.join(str(cause).split())}"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
