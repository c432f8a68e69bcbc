"""A reward by math-verify: 1 where what the policy wrote equals a field of the row. Runs in the process of reward functions."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from math_verify import parse, verify

from .matches import answer

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns of each call without a timeout of its own


def math(completion: str, finish_reason: str, gold: str, after: str | None) -> float:
    """1.0 where math-verify finds the answer equal to the field. Raises ValueError where it finds no value in the field."""
    expected, found = _gold(gold), answer(completion, finish_reason, after)
    # Timeouts of the library work by signals, in a main thread alone. The process of the function is ended in their place.
    return float(bool(found) and verify(expected, parse(found, parsing_timeout=None), timeout_seconds=None))


@cache
def _gold(gold: str) -> Any:
    """The field's value. Text without marks of LaTeX is taken for LaTeX where nothing is found in it otherwise."""
    found = parse(gold, parsing_timeout=None) or parse(f"${gold}$", parsing_timeout=None)
    if all(isinstance(value, str) for value in found):  # a text that the library could not read
        raise ValueError(f"math-verify finds no value in {gold[:60]!r}")
    return found
