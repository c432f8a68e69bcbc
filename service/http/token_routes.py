"""/tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import Field

from .chat import Message, Tool
from .http_errors import HttpError
from .request_fields import Body, check_model
from .routes import ApiRoute
from .state import HttpState, state_of
from .text import encode, need_tokenizer, render_chat, token_text

router = APIRouter(route_class=ApiRoute, tags=["Tokens"])
State = Annotated[HttpState, Depends(state_of)]


class TokenizeBody(Body):
    """Text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    tools: list[Tool] | None = None
    add_special_tokens: bool = Field(True, description="of a prompt: begin with the beginning-of-sequence token")
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


class DetokenizeBody(Body):
    """Token ids."""

    model: str | None = None
    tokens: list[int]


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, state: State) -> dict[str, Any]:
    """The tokens that /v1/completions, or /v1/chat/completions, would be given."""
    check_model(body.model, state)
    if (body.prompt is None) == (body.messages is None):
        raise HttpError(400, "prompt: give one of prompt and messages", "prompt")
    if body.prompt is not None:
        tokens = await encode(state, body.prompt, "prompt", body.add_special_tokens)
    else:
        if body.add_generation_prompt and body.continue_final_message:
            raise HttpError(400, "continue_final_message: give add_generation_prompt: false beside it", "continue_final_message")
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        tokens = await render_chat(state, [message.for_template() for message in body.messages or ()], tools,
                                   body.add_generation_prompt, body.continue_final_message, body.chat_template_kwargs)
    found: dict[str, Any] = {"count": len(tokens), "max_model_len": state.sizes.positions, "tokens": list(tokens),
                             "token_strs": None}  # fmt: skip
    if body.return_token_strs:
        found["token_strs"] = [token_text(state.tokenizer, token) for token in tokens]
    return found


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, state: State) -> dict[str, Any]:
    """The text of tokens, special ones included."""
    check_model(body.model, state)
    tokenizer, vocabulary = need_tokenizer(state, "tokens"), state.sizes.vocabulary
    if any(not 0 <= token < vocabulary for token in body.tokens):
        raise HttpError(400, f"tokens: one is outside 0..{vocabulary - 1}", "tokens")
    return {"prompt": tokenizer.decode(body.tokens)}
