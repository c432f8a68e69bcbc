"""Runs the prompt of a trainer's route to its end."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import Request

from ...rollout.params import SamplingParams
from ...rollout.types import RolloutRequest, Trajectory
from .http_errors import HttpError
from .sample_streams import all_samples
from .state import HttpState


async def generate(
    request: Request, state: HttpState, prompt: Sequence[int], params: SamplingParams, name: str | None = None,
    cache_salt: str = "", priority: int = 0,
) -> list[Trajectory]:
    """The samples of one prompt, in order, whatever ended them.

    Args: name: the client's own name for the request, by which it may be aborted.

    Raises HttpError for more samples, or alternatives per token, than one request may have.
    """
    for field, limit in (("n", state.options.max_samples), ("logprobs", state.options.max_logprobs),
                         ("prompt_logprobs", state.options.max_logprobs)):  # fmt: skip
        if (getattr(params, field) or 0) > limit:
            option = "max_samples" if field == "n" else "max_logprobs"
            raise HttpError(400, f"{field}: {getattr(params, field)} is more than {limit} (http.{option})", field)
    rollout = RolloutRequest(state.dispatch.new_id(), tuple(prompt), params, priority=priority, cache_salt=cache_salt)
    with state.names.named(name, rollout.id):
        return (await all_samples(request, state.dispatch, [rollout]))[0]
