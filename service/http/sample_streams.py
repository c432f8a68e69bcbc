"""Waits for the samples of a request: all of them, or each piece as it comes.

Invariant: the pieces of a sample, joined, are its trajectory. Where an engine died and the sample that began anew became another
one (`lossless` and `mixed` may), the stream ends with an error.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from functools import partial
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic_core import to_json

from ...errors import BlockrollError
from ...rollout.backend import Progress
from ...rollout.types import RolloutRequest, Trajectory
from .dispatch import Answers, Dispatch
from .http_errors import HttpError, as_http_error, body_of, client_gone
from .pieces import Piece

T = TypeVar("T")
MAY_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""What the OpenAPI document says of a route that may answer with `event_stream`."""


def json_response(body: Any) -> Response:
    """An answer of 200."""
    return Response(to_json(body), media_type="application/json")


def usage(prompts: Sequence[Sequence[int]], completion: int) -> dict[str, int]:
    """Tokens of the prompts, each counted once, and of the samples."""
    prompt = sum(map(len, prompts))
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def event_stream(request: Request, chunks: AsyncGenerator[dict[str, Any], None]) -> Response:
    """Server-sent events: each chunk, then [DONE]. What goes wrong before the first chunk is raised; later, it is an event."""
    first = await unless_disconnected(request, anext(chunks))

    async def events() -> AsyncIterator[bytes]:
        async with contextlib.aclosing(chunks):
            yield _event(first)
            try:
                async for chunk in chunks:
                    yield _event(chunk)
            except (BlockrollError, HttpError) as error:
                yield _event(body_of(as_http_error(error)))
            yield b"data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + to_json(chunk) + b"\n\n"


async def all_samples(request: Request, dispatch: Dispatch, wanted: Sequence[RolloutRequest]) -> list[list[Trajectory]]:
    """The samples of each request, in order. A client that disconnects has them cancelled. Raises BlockrollError or HttpError."""
    found: dict[str, list[Trajectory]] = {each.id: [] for each in wanted}
    async with dispatch.open(wanted) as answers:
        # A task for the samples too, and a wait for both, would take a tenth of what the request takes here.
        gone = asyncio.ensure_future(_disconnected(request))
        gone.add_done_callback(partial(_end, answers))
        try:
            async for item in answers:
                if isinstance(item, Trajectory):
                    found[item.request_id].append(item)
        finally:
            gone.cancel()
    return [sorted(samples, key=lambda sample: sample.sample) for samples in found.values()]


def _end(answers: Answers, gone: asyncio.Future[None]) -> None:
    """Ends the wait of a client that has disconnected."""
    if not gone.cancelled():
        error = gone.exception()
        answers.enter(error if isinstance(error, Exception) else client_gone())


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise client_gone()
    finally:
        for task in (working, gone):
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass




async def pieces(
    dispatch: Dispatch, wanted: Sequence[RolloutRequest]
) -> AsyncGenerator[tuple[int, int, Piece, Trajectory | None], None]:
    """What comes: (place of the request, number of the sample, new tokens, the trajectory with the last of them).

    Raises:
        BlockrollError, HttpError: what ended one of the requests.
    """
    places = {each.id: place for place, each in enumerate(wanted)}
    told: dict[tuple[str, int], list[int]] = {}
    async with dispatch.open(wanted, progress=True) as answers:
        async for item in answers:
            known = told.setdefault((item.request_id, item.sample), [])
            place = places[item.request_id]
            if isinstance(item, Progress):
                end = item.start + len(item.tokens)
                if item.start <= len(known) < end:
                    piece = Piece.of_progress(item, len(known))
                    known += piece.tokens
                    yield place, item.sample, piece, None
                continue
            if item.tokens[: len(known)] != known:
                raise HttpError(503, "an engine died, and the sample that began anew is another one; try again",
                                code="unavailable")  # fmt: skip
            yield place, item.sample, Piece.of_trajectory(item, len(known)), item
