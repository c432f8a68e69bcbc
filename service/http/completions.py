"""/v1/completions: prompts as text or token ids, one or many."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import Field

from ...rollout.search.candidates import SearchResult
from ...rollout.search.config import SearchConfig
from ...rollout.types import RolloutRequest, Trajectory
from .http_errors import HttpError
from .pieces import Piece, completion_logprobs, prompt_logprobs
from .request_fields import GenerationBody
from .routes import ApiRoute
from .sample_streams import MAY_STREAM, all_samples, event_stream, json_response, pieces, usage
from .search import finish_reason, search_field, search_prompts
from .state import HttpState, state_of
from .text import TextStream, check_prompt, encode, need_tokenizer, whole_text

router = APIRouter(prefix="/v1", route_class=ApiRoute, tags=["OpenAI"])


class CompletionBody(GenerationBody):
    """A request for completions."""

    prompt: str | list[int] | list[str] | list[list[int]] = Field(description="text, token ids, or a list of one of these")
    max_tokens: int | None = Field(None, ge=1, description="none for the service's default")
    logprobs: int | None = Field(None, ge=0, description="log-probabilities of tokens, and so many alternatives")
    echo: bool = Field(False, description="the text begins with the prompt")
    best_of: int | None = Field(None, description="n, or none")
    suffix: None = None
    use_beam_search: Literal[False] = Field(False, description="no: AReaL sends it")


@router.post("/completions", responses=MAY_STREAM)
async def completions(body: CompletionBody, request: Request, state: Annotated[HttpState, Depends(state_of)]) -> Response:
    """Completes prompts."""
    if body.best_of not in (None, body.n):
        raise HttpError(400, f"best_of: {body.best_of} is not n ({body.n}); samples are not ranked", "best_of")
    if body.echo and body.logprobs is not None:
        raise HttpError(400, "echo: given beside logprobs; use prompt_logprobs", "echo")
    prompt = body.prompt
    several = not isinstance(prompt, str) and bool(prompt) and not isinstance(prompt[0], int)
    given: Sequence[Any] = prompt if several else [prompt]
    body.check(state, len(given))
    params = body.params(state, body.max_tokens, body.logprobs)
    prompts = [check_prompt(state, await encode(state, each, "prompt") if isinstance(each, str) else each, "prompt")
               for each in given]  # fmt: skip
    if body.search is not None:
        asked = [(tokens, each if isinstance(each, str) else None) for tokens, each in zip(prompts, given, strict=True)]
        config, found = await search_prompts(request, state, body, asked, params)
        return json_response(_searched(body, state, config, found, prompts))
    answer = _Completions(body, state, body.requests(state, prompts, params), given)
    if body.stream:
        return await event_stream(request, answer.chunks())
    return json_response(answer.whole(await all_samples(request, state.dispatch, answer.requests)))


def _searched(
    body: CompletionBody, state: HttpState, config: SearchConfig, found: Sequence[SearchResult], prompts: Sequence[Sequence[int]]
) -> dict[str, Any]:  # fmt: skip
    """One choice per prompt."""
    choices = []
    for place, (result, prompt) in enumerate(zip(found, prompts, strict=True)):
        choice = {"index": place, "text": result.text or "", "logprobs": None, "finish_reason": finish_reason(result),
                  "search": search_field(config, result)}  # fmt: skip
        if body.return_token_ids:
            chosen = result.verdict.chosen
            choice |= {"token_ids": [] if chosen is None else list(chosen.tokens), "prompt_token_ids": list(prompt)}
        choices.append(choice)
    return {"id": f"cmpl-{state.dispatch.new_id()}", "object": "text_completion", "created": int(time.time()),
            "model": state.policy, "choices": choices,
            "usage": usage(prompts, sum(result.spent.tokens for result in found))}  # fmt: skip


class _Completions:
    """One request's answer. `given`: its prompts as the client wrote them."""

    def __init__(self, body: CompletionBody, state: HttpState, requests: list[RolloutRequest], given: Sequence[Any]) -> None:
        self.body, self.state, self.requests, self._given = body, state, requests, given
        self._prompts = [each.prompt_tokens for each in requests]
        self._head = {"id": f"cmpl-{requests[0].id}", "object": "text_completion", "created": int(time.time()),
                      "model": state.policy}  # fmt: skip

    def whole(self, samples: Sequence[Sequence[Trajectory]]) -> dict[str, Any]:
        """All choices."""
        choices = []
        for place, group in enumerate(samples):
            for sample in group:
                text = self._prompt_text(place) + whole_text(self.state.tokenizer, sample, self.body.skip_special_tokens)
                choices.append(self._choice(place, sample.sample, text, 0, Piece.of_trajectory(sample), sample))
        tokens = sum(len(sample.tokens) for group in samples for sample in group)
        return {**self._head, "choices": choices, "usage": usage(self._prompts, tokens)}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """The choices in pieces."""
        body, tokens = self.body, 0
        texts: dict[tuple[int, int], TextStream] = {}
        held = [] if body.include_stop_str_in_output else list(self.requests[0].params.stop)
        async with aclosing(pieces(self.state.dispatch, self.requests)) as found:
            async for place, number, piece, end in found:
                stream = texts.setdefault((place, number), TextStream(self.state.tokenizer, held, body.skip_special_tokens))
                offset = len(stream.emitted)
                if end is None:
                    text = stream.push(piece.tokens)
                else:
                    text = stream.finish(whole_text(self.state.tokenizer, end, body.skip_special_tokens))
                if not piece.start:
                    text = self._prompt_text(place) + text
                tokens += len(piece.tokens)
                yield {**self._head, "choices": [self._choice(place, number, text, offset, piece, end)]}
        if body.stream_options is not None and body.stream_options.include_usage:
            yield {**self._head, "choices": [], "usage": usage(self._prompts, tokens)}

    def _choice(self, place: int, number: int, text: str, offset: int, piece: Piece, end: Trajectory | None) -> dict[str, Any]:
        body, tokenizer = self.body, self.state.tokenizer
        logprobs = None
        if body.logprobs is not None or body.logprob_token_ids:
            logprobs = completion_logprobs(piece, tokenizer, body.return_tokens_as_token_ids, offset)
        choice = {"index": place * body.n + number, "text": text, "logprobs": logprobs,
                  "finish_reason": None if end is None else end.finish_reason, **body.extensions(piece, end)}  # fmt: skip
        if body.return_token_ids and not piece.start:
            choice["prompt_token_ids"] = list(self.requests[place].prompt_tokens)
        if end is not None and body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(end, tokenizer)
        return choice

    def _prompt_text(self, place: int) -> str:
        if not self.body.echo:
            return ""
        given = self._given[place]
        text: str = given if isinstance(given, str) else need_tokenizer(self.state, "echo").decode(given)
        return text
