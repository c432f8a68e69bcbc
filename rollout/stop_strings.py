"""Stop strings: which token completes one, and where the text is cut.

Invariants:
- A stop string is looked for in the decoded text, so it may begin and end inside tokens and lie across blocks.
- Only text that a new token brought can complete a string: the string must end after the text that stood before the token.
- The token that completes a string is the sample's last one. Of several strings that one token completes, the one that begins
  first in the text counts.

Decoding needs the last few tokens only. A window of them is decoded, long enough that its beginning cannot change what stands
at its end: bytes of a character that was cut in two, or a space that a tokenizer drops at the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .params import SamplingParams

_MARGIN = 8
"""Characters at the start of a window that are not trusted."""


class StopStrings:
    """Finds the token that completes a stop string.

    Args:
        tokenizer: its `decode(tokens, skip_special_tokens=True)` gives text.
        params: with at least one stop string. Before `min_tokens` generated tokens none counts.
        prompt: how many tokens the prompt has; they are not looked at.
    """

    def __init__(self, tokenizer: Any, params: SamplingParams, prompt: int) -> None:
        self._tokenizer, self._strings, self._prompt, self._min_tokens = tokenizer, params.stop, prompt, params.min_tokens
        self._longest = max(map(len, self._strings))

    def first(self, tokens: Sequence[int], new: Sequence[int]) -> tuple[int, str] | None:
        """(how many of the new tokens the sample keeps, the string that ended it); None where no string is complete.

        Args:
            tokens: prompt and generated tokens so far. new: those that follow, in order.
        """
        window = self._window(tokens)
        before = self._decode(window)
        for count, token in enumerate(new, 1):
            window = [*window, token]
            after = self._decode(window)
            if len(tokens) - self._prompt + count > self._min_tokens:
                found = [(at, stop) for stop in self._strings if (at := _completed(stop, before, after)) >= 0]
                if found:
                    return count, min(found)[1]
            before = after
        return None

    def _window(self, tokens: Sequence[int]) -> list[int]:
        """Generated tokens at the end whose text is as long as the longest string and the margin."""
        wanted, count = self._longest + _MARGIN, 16
        while True:
            window = list(tokens[max(self._prompt, len(tokens) - count) :])
            if len(window) < count or len(self._decode(window)) >= wanted:
                return window
            count *= 2

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


def _completed(stop: str, before: str, after: str) -> int:
    """Where `stop` begins in `after`, ending in what `before` lacks; -1 where it does not."""
    shared = next((i for i, (a, b) in enumerate(zip(before, after)) if a != b), min(len(before), len(after)))
    return after.find(stop, max(shared + 1 - len(stop), 0))


def cut_text(tokenizer: Any, tokens: Sequence[int], stop: str | None, included: bool, skip_special_tokens: bool = True) -> str:
    """The text of a sample's tokens, cut before (`included`: after) the stop string that its last token completed."""
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)
    if stop is None:
        return text
    at = _completed(stop, tokenizer.decode(list(tokens[:-1]), skip_special_tokens=skip_special_tokens), text)
    return text if at < 0 else text[: at + len(stop) * included]
