"""Rewards by comparison with a field of the row. They run in the process of reward functions, which ends what takes too long."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any


def exact(completion: str, finish_reason: str, gold: str, after: str | None) -> float:
    """1.0 where the answer is the text of the field."""
    found = answer(completion, finish_reason, after)
    return float(found is not None and found == gold.strip())


def math(completion: str, finish_reason: str, gold: str, after: str | None) -> float:
    """1.0 where math-verify finds the answer equal to the field. Raises ValueError where it finds no value in the field."""
    expected, (parse, verify) = _gold(gold), _library()
    found = answer(completion, finish_reason, after)
    # Timeouts of the library work by signals, in a main thread alone. The process of the function is ended in their place.
    return float(bool(found) and verify(expected, parse(found, parsing_timeout=None), timeout_seconds=None))


def answer(completion: str, finish_reason: str, after: str | None) -> str | None:
    """What is compared; None where there is no answer."""
    if finish_reason != "stop":
        return None
    if after is not None:
        _, mark, completion = completion.rpartition(after)
        if not mark:
            return None
    return completion.strip()


@cache
def _library() -> Any:
    from math_verify import parse, verify  # takes a second

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns of each call without a timeout of its own
    return parse, verify


@cache
def _gold(gold: str) -> Any:
    """The field's value. Text without marks of LaTeX is taken for LaTeX where nothing is found in it otherwise."""
    parse, _ = _library()
    found = parse(gold, parsing_timeout=None) or parse(f"${gold}$", parsing_timeout=None)
    if not found:
        raise ValueError(f"math-verify finds no value in {gold[:60]!r}")
    return found
