"""The text of single tokens.

A token may be a part of a character, which has no text of its own: it is shown as the tokenizer spells it, in angle brackets.
Without a tokenizer a token is shown as its id.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def pieces(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """The text of each token, as it stands inside a text."""
    if tokenizer is None:
        return [f"{token} " for token in ids]
    return [_piece(tokenizer, int(token)) for token in ids]


def _piece(tokenizer: Any, token: int) -> str:
    try:
        spelt = tokenizer.convert_ids_to_tokens(token)
        text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    except (IndexError, KeyError, OverflowError, TypeError, ValueError):
        return f"⟨{token}⟩"
    if not isinstance(spelt, str):
        return f"⟨{token}⟩"
    if "\N{REPLACEMENT CHARACTER}" in text:
        return f"⟨{spelt}⟩"
    # SentencePiece marks a blank before a word, and drops it where a text begins.
    return f" {text}" if spelt.startswith("\N{LOWER ONE EIGHTH BLOCK}") and not text.startswith(" ") else text
