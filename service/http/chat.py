"""/v1/chat/completions: a conversation, written by the chat template, and its next message."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import ConfigDict, Field

from ...rollout.search.candidates import SearchResult
from ...rollout.search.config import SearchConfig
from ...rollout.types import RolloutRequest, Trajectory
from .http_errors import HttpError
from .pieces import Piece, chat_logprobs, prompt_logprobs
from .request_fields import Body, GenerationBody
from .routes import ApiRoute
from .sample_streams import MAY_STREAM, all_samples, event_stream, json_response, pieces, usage
from .search import finish_reason, search_field, search_prompts
from .state import HttpState, state_of
from .text import TextStream, check_prompt, render_chat, whole_text
from .tool_calls import OPENINGS, ToolCall, parse_tool_calls

router = APIRouter(prefix="/v1", route_class=ApiRoute, tags=["OpenAI"])


class TextPart(Body):
    """Text in a message of several parts."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One message. Further fields go to the template as they are."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, hide_input_in_errors=True)
    role: str = Field(min_length=1, max_length=64)
    content: str | list[TextPart] | None = None
    tool_calls: list[dict[str, Any]] | None = None

    def for_template(self) -> dict[str, Any]:
        """As templates read it: content as text, arguments of calls as objects."""
        message = {name: value for name, value in self.model_dump().items() if value is not None or name == "content"}
        if isinstance(self.content, list):
            message["content"] = "\n".join(part.text for part in self.content)
        if self.tool_calls:
            message["tool_calls"] = [_with_object(call) for call in self.tool_calls]
        return message


class Function(Body):
    """A function that may be called."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, hide_input_in_errors=True)
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    """A tool."""

    type: Literal["function"]
    function: Function


class ResponseFormat(Body):
    """Text is all there is."""

    type: Literal["text"]


class ChatBody(GenerationBody):
    """A request for the next message."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, description="none for the service's default")
    max_completion_tokens: int | None = Field(None, ge=1, description="as max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, description="alternatives per token; needs logprobs")
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto"] | None = Field(None, description="calls cannot be forced")
    parallel_tool_calls: Literal[True] | None = None
    response_format: ResponseFormat | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    def tool_list(self) -> list[dict[str, Any]]:
        """The tools that the template shows; none with tool_choice none."""
        if not self.tools or self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_none=True) for tool in self.tools]


@router.post("/chat/completions", responses=MAY_STREAM)
async def chat_completions(body: ChatBody, request: Request, state: Annotated[HttpState, Depends(state_of)]) -> Response:
    """The next message of a conversation."""
    if body.top_logprobs and not body.logprobs:
        raise HttpError(400, "top_logprobs: given without logprobs: true", "top_logprobs")
    if body.add_generation_prompt and body.continue_final_message:
        raise HttpError(400, "continue_final_message: give add_generation_prompt: false beside it", "continue_final_message")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise HttpError(400, "max_completion_tokens: differs from max_tokens; give one of the two", "max_completion_tokens")
    body.check(state, 1)
    params = body.params(state, body.max_completion_tokens or body.max_tokens, body.top_logprobs if body.logprobs else None)
    tools = body.tool_list()
    messages = [message.for_template() for message in body.messages]
    tokens = await render_chat(state, messages, tools, body.add_generation_prompt, body.continue_final_message,
                               body.chat_template_kwargs)  # fmt: skip
    prompt = check_prompt(state, tokens, "messages")
    if body.search is not None:
        config, [found] = await search_prompts(request, state, body, [(prompt, None)], params)
        return json_response(_searched(body, state, config, found, prompt, tools))
    [wanted] = body.requests(state, [prompt], params)
    answer = _Chat(body, state, wanted, tools)
    if body.stream:
        return await event_stream(request, answer.chunks())
    return json_response(answer.whole((await all_samples(request, state.dispatch, [wanted]))[0]))


def _searched(
    body: ChatBody, state: HttpState, config: SearchConfig, found: SearchResult, prompt: Sequence[int],
    tools: Sequence[dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """One choice."""
    text, calls = parse_tool_calls(found.text or "", tools) if tools else (found.text or "", [])
    reason = finish_reason(found)
    choice = {"index": 0, "message": _message(text, calls), "logprobs": None,
              "finish_reason": "tool_calls" if calls and reason == "stop" else reason,
              "search": search_field(config, found)}  # fmt: skip
    answer = {"id": f"chatcmpl-{state.dispatch.new_id()}", "object": "chat.completion", "created": int(time.time()),
              "model": state.policy, "choices": [choice], "usage": usage([prompt], found.spent.tokens)}  # fmt: skip
    if body.return_token_ids:
        choice["token_ids"] = [] if found.verdict.chosen is None else list(found.verdict.chosen.tokens)
        answer["prompt_token_ids"] = list(prompt)
    return answer


def _message(text: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
    return message | ({"tool_calls": [call.as_json() for call in calls]} if calls else {})


class _Chat:
    """One request's answer. `tools`: calls of them are parsed."""

    def __init__(self, body: ChatBody, state: HttpState, request: RolloutRequest, tools: Sequence[dict[str, Any]]) -> None:
        self.body, self.state, self.request, self.tools = body, state, request, tools
        self._head = {"id": f"chatcmpl-{request.id}", "created": int(time.time()), "model": state.policy}

    def whole(self, samples: Sequence[Trajectory]) -> dict[str, Any]:
        """All choices."""
        choices = []
        for sample in samples:
            text, calls = self._parsed(sample)
            piece = Piece.of_trajectory(sample)
            choices.append({"index": sample.sample, "message": _message(text, calls), **self._more(piece, sample, bool(calls))})
        answer = {**self._head, "object": "chat.completion", "choices": choices,
                  "usage": usage([self.request.prompt_tokens], sum(len(sample.tokens) for sample in samples))}  # fmt: skip
        return answer | self._of_prompt(samples[0])

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """The choices in pieces. Calls come whole, with the last piece."""
        body, tokens, head = self.body, 0, {**self._head, "object": "chat.completion.chunk"}
        texts: dict[int, TextStream] = {}
        held = [] if body.include_stop_str_in_output else list(self.request.params.stop)
        async with aclosing(pieces(self.state.dispatch, [self.request])) as found:
            async for _, number, piece, end in found:
                first = number not in texts
                stream = texts.setdefault(number, TextStream(self.state.tokenizer, held, body.skip_special_tokens,
                                                             OPENINGS if self.tools else ()))
                delta: dict[str, Any] = {"role": "assistant"} if first else {}
                whole, calls = ("", []) if end is None else self._parsed(end)
                delta["content"] = stream.push(piece.tokens) if end is None else stream.finish(whole)
                if calls:
                    delta["tool_calls"] = [call.as_json(index) for index, call in enumerate(calls)]
                tokens += len(piece.tokens)
                chunk = {**head, "choices": [{"index": number, "delta": delta, **self._more(piece, end, bool(calls))}]}
                yield chunk if end is None else chunk | self._of_prompt(end)
        if body.stream_options is not None and body.stream_options.include_usage:
            yield {**head, "choices": [], "usage": usage([self.request.prompt_tokens], tokens)}

    def _parsed(self, sample: Trajectory) -> tuple[str, list[Any]]:
        text = whole_text(self.state.tokenizer, sample, self.body.skip_special_tokens)
        return parse_tool_calls(text, self.tools) if self.tools else (text, [])

    def _more(self, piece: Piece, end: Trajectory | None, calls: bool) -> dict[str, Any]:
        body = self.body
        logprobs = None
        if body.logprobs or body.logprob_token_ids:
            logprobs = chat_logprobs(piece, self.state.tokenizer, body.return_tokens_as_token_ids)
        finish = None if end is None else "tool_calls" if calls and end.finish_reason == "stop" else end.finish_reason
        return {"logprobs": logprobs, "finish_reason": finish, **body.extensions(piece, end)}

    def _of_prompt(self, sample: Trajectory) -> dict[str, Any]:
        """What is said once of the prompt."""
        found: dict[str, Any] = {}
        if self.body.return_token_ids:
            found["prompt_token_ids"] = list(self.request.prompt_tokens)
        if self.body.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs(sample, self.state.tokenizer)
        return found


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    """A call of an earlier message with its arguments as an object, where they are JSON."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}
