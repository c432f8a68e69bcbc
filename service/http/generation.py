"""Samples of the prompt of a trainer's route: all of them, or each piece as it comes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from fastapi import Request

from ...rollout.params import SamplingParams
from ...rollout.types import RolloutRequest, Trajectory
from .http_errors import HttpError
from .limits import check_entries
from .pieces import Piece
from .sample_streams import all_samples, pieces
from .state import HttpState


def prepared(
    state: HttpState, prompt: Sequence[int], params: SamplingParams, cache_salt: str = "", priority: int = 0
) -> RolloutRequest:  # fmt: skip
    """The request for these samples.

    Raises HttpError for more samples, or alternatives per token, than one request may have, or an answer that may be too large.
    """
    for field, limit in (("n", state.options.max_samples), ("logprobs", state.options.max_logprobs),
                         ("prompt_logprobs", state.options.max_logprobs)):  # fmt: skip
        if (getattr(params, field) or 0) > limit:
            option = "max_samples" if field == "n" else "max_logprobs"
            raise HttpError(400, f"{field}: {getattr(params, field)} is more than {limit} (http.{option})", field)
    check_entries(params, [prompt])
    return RolloutRequest(state.dispatch.new_id(), tuple(prompt), params, priority=priority, cache_salt=cache_salt)


async def generate(request: Request, state: HttpState, wanted: RolloutRequest, name: str | None = None) -> list[Trajectory]:
    """The samples, in order, whatever ended them.

    Args: name: the client's own name for the request, by which it may be aborted.
    """
    with state.names.named(name, wanted.id):
        return (await all_samples(request, state.dispatch, [wanted]))[0]


async def generate_pieces(
    state: HttpState, wanted: RolloutRequest, name: str | None = None
) -> AsyncGenerator[tuple[int, Piece, Trajectory | None], None]:
    """What comes of the samples: (number, new tokens, the trajectory with the last of them); `name` as in `generate`."""
    with state.names.named(name, wanted.id):
        async with aclosing(pieces(state.dispatch, [wanted])) as found:
            async for _, number, piece, end in found:
                yield number, piece, end
