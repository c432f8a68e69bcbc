"""Text to tokens and back: prompts, chat templates, and the text of a sample that is still being made.

Invariant: what `TextStream` has emitted when a sample ends is the sample's whole text, whatever pieces its tokens came in.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from ...model.tokenizer import encode_prompt
from ...rollout.stop_strings import cut_text
from ...rollout.types import Trajectory
from .http_errors import HttpError
from .state import HttpState

LONG_TEXT = 16_384
"""Characters from which a text is encoded in a thread: encoding takes about a millisecond per 4,000."""
MAX_BROKEN = 16
"""Tokens that are decoded again with each one that follows, because a character may become whole; it takes four at most. More of
them are bytes that are no text. They are decoded again when they have grown by a quarter: with each one, that would take time
with their square."""
_BROKEN = "\N{REPLACEMENT CHARACTER}"


def need_tokenizer(state: HttpState, field: str) -> Any:
    """The tokenizer. Raises HttpError where the policy has none."""
    if state.tokenizer is None:
        raise HttpError(400, f"{field}: the policy has no tokenizer; send token ids to /v1/completions", field, "no_tokenizer")
    return state.tokenizer


async def encode(state: HttpState, text: str, field: str, special: bool = True) -> tuple[int, ...]:
    """The tokens of a prompt, after the beginning-of-sequence token where the tokenizer has one, unless `special` is false."""
    tokenizer = need_tokenizer(state, field)

    def run() -> tuple[int, ...]:
        return tuple(encode_prompt(tokenizer, text) if special else tokenizer.encode(text, add_special_tokens=False))

    return await asyncio.to_thread(run) if len(text) > LONG_TEXT else run()


def check_prompt(state: HttpState, tokens: Sequence[int], field: str) -> tuple[int, ...]:
    """The tokens. Raises HttpError for none, for one that the policy lacks, and for more than leave room for a completion."""
    most, vocabulary = state.sizes.positions - 1, state.sizes.vocabulary
    if not tokens:
        raise HttpError(400, f"{field}: is empty; give at least one token", field)
    if len(tokens) > most:
        raise HttpError(400, f"{field}: {len(tokens)} tokens are more than the policy's {most}; shorten the prompt", field,
                        "context_length_exceeded")
    if min(tokens) < 0 or max(tokens) >= vocabulary:
        wrong = min(tokens) if min(tokens) < 0 else max(tokens)
        raise HttpError(400, f"{field}: token {wrong} is outside 0..{vocabulary - 1}; use the policy's own tokenizer", field)
    return tuple(tokens)


async def render_chat(
    state: HttpState, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True, continue_final_message: bool = False, more: Mapping[str, Any] | None = None,
) -> tuple[int, ...]:
    """The tokens of a conversation by the chat template.

    Args: more: further variables of the template.
    """
    tokenizer = need_tokenizer(state, "messages")
    if state.chat_template is None and getattr(tokenizer, "chat_template", None) is None:
        raise HttpError(400, "messages: the policy's tokenizer has no chat template; set http.chat_template, or use "
                             "/v1/completions", "messages", "no_chat_template")  # fmt: skip
    taken = inspect.signature(tokenizer.apply_chat_template).parameters.keys() & (more or {}).keys()
    if taken:
        raise HttpError(400, f"chat_template_kwargs: {min(taken)[:60]!r} is not a variable of the template",
                        "chat_template_kwargs")  # fmt: skip

    def run() -> tuple[int, ...]:
        try:
            ids = tokenizer.apply_chat_template(
                list(messages), tools=list(tools) if tools else None, chat_template=state.chat_template, tokenize=True,
                return_dict=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message, **(more or {}))
        except Exception as error:  # a template raises whatever its author chose
            said = " ".join(str(error).split())[:300]
            raise HttpError(400, f"messages: the chat template refuses them ({said})", "messages", "bad_messages") from error
        return tuple(ids)

    return await asyncio.to_thread(run)


def whole_text(tokenizer: Any, trajectory: Trajectory, skip_special: bool = True) -> str:
    """The text of a finished sample, cut at the stop string that ended it; empty without a tokenizer."""
    if tokenizer is None:
        return ""
    stop = trajectory.stop_reason if isinstance(trajectory.stop_reason, str) else None
    return cut_text(tokenizer, trajectory.tokens, stop, trajectory.stop_included, skip_special)


def token_text(tokenizer: Any, token: int, as_id: bool = False) -> str:
    """One token as log-probabilities show it."""
    if as_id or tokenizer is None:
        return f"token_id:{token}"
    text: str = tokenizer.decode([token])
    return text


class TextStream:
    """The text of one sample, emitted while its tokens come.

    What may still change is held back: a character of which bytes are missing, and the beginning of a stop string.

    Args:
        held: strings of which no beginning is emitted before it is known whether the rest follows: stop strings.
        barriers: strings of which neither the beginning nor anything behind them is emitted: marks of tool calls. Nor are blanks
            at the end, which are no part of the text before a call.
    """

    def __init__(self, tokenizer: Any, held: Sequence[str], skip_special: bool, barriers: Sequence[str] = ()) -> None:
        self._tokenizer, self._held, self._skip = tokenizer, (*held, *barriers), skip_special
        self._barriers = barriers
        self._tokens: list[int] = []
        self._prefix = self._read = self._next = 0
        self._text = ""
        self.emitted = ""

    def push(self, tokens: Sequence[int]) -> str:
        """The text that can be emitted now that these tokens have come."""
        self._tokens += tokens
        if self._tokenizer is None:
            return ""
        # Decoded behind the last tokens that were whole, because a tokenizer may drop a space at the start of a text.
        if len(self._tokens) < self._next:
            return ""
        before, after = self._decode(self._prefix, self._read), self._decode(self._prefix, len(self._tokens))
        if after.endswith(_BROKEN) or len(after) < len(before):
            held = len(self._tokens) - self._read
            self._next = len(self._tokens) + max(1, (held - MAX_BROKEN) // 4)
            return ""
        self._text += after[len(before) :]
        self._prefix, self._read = self._read, len(self._tokens)
        upto = self._text[: len(self._text) - self._withheld()]
        return self._emit(upto.rstrip() if self._barriers else upto)

    def finish(self, whole: str) -> str:
        """The rest of the text, given all of it."""
        return self._emit(whole)

    def _emit(self, upto: str) -> str:
        new = upto[len(self.emitted) :]
        self.emitted += new
        return new

    def _withheld(self) -> int:
        """Characters at the end that are not emitted yet."""
        passed = [at for barrier in self._barriers if (at := self._text.find(barrier)) >= 0]
        if passed:
            return len(self._text) - min(passed)
        return max((size for string in self._held for size in range(1, min(len(string), len(self._text) + 1))
                    if self._text.endswith(string[:size])), default=0)

    def _decode(self, start: int, end: int) -> str:
        text: str = self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=self._skip)
        return text
