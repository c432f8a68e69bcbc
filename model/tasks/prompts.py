"""Questions in the form that the shipped policies were trained on, and the answer in what they write."""

from __future__ import annotations

import re

ANSWER = "\nA:"
"""What stands between the steps and the answer."""


def question(text: str) -> str:
    """The prompt that asks a question: `Q:47+85-12` and, on the next line, `S:`, after which the steps begin.

    Args:
        text: sums and products (`47 + 85 - 12`, `7*8`), `gcd 75 12`, `310 base 7 to 8`, or `bits 3415`. Spaces around `+`, `-`
            and `*`, and `=` or `?` at the end, are left out.
    """
    text = re.sub(r"[\s=?]+$", "", text.strip())
    compact = re.sub(r" *([-+*]) *", r"\1", text)
    return f"Q:{compact}\nS:"


def answer(text: str) -> str | None:
    """The answer in a completion, or None where it holds none."""
    _, mark, found = text.rpartition(ANSWER.strip())
    return found.strip() or None if mark else None
