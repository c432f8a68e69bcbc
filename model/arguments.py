"""Checks of arguments at the edges of the library: types, token ids, temperatures. They raise RequestError with one line.

This module imports the standard library and `errors` alone. NumPy registers its numbers as those of `numbers`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from ..errors import RequestError

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e4
"""Least temperature above 0, and the upper bound: a logit of 1e9 divided by the least one stays below the largest float32."""
_SHOWN = 60
"""Most characters of a value in a message."""


def require(condition: bool, name: str, problem: str, remedy: str) -> None:
    """Raise the RequestError of field `name` unless the condition holds."""
    if not condition:
        raise RequestError(name, problem, remedy)


def short(value: object) -> str:
    """A value as messages show it: on one line, cut. Only the beginning of a long text or list is written out."""
    if isinstance(value, str | bytes | list | tuple):
        value = value[: _SHOWN + 1]
    try:
        text = repr(value)
    except Exception:  # the value is the user's, and so is its __repr__
        text = f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def is_whole(value: object) -> bool:
    """Whether this is a whole number, Python's or NumPy's. True and False are none."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def is_number(value: object) -> bool:
    """Whether this is a number, Python's or NumPy's. True and False are none."""
    return type(value) in (int, float) or (isinstance(value, Real) and not isinstance(value, bool))


def is_list(value: object) -> bool:
    """Whether this has a length and items, by position."""
    return isinstance(value, Iterable) and hasattr(value, "__len__") and not isinstance(value, str | bytes | bytearray | Mapping)


def token_ids(value: Any, field: str) -> tuple[int, ...]:
    """Token ids as Python integers: of a list, an array or a tensor of whole numbers. Nothing is rounded.

    Raises:
        RequestError: there is something else, or a negative number.
    """
    remedy = "give a list of token ids, whole numbers from 0"
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | bytearray | Mapping):
        raise RequestError(field, f"{short(value)} is no list of token ids", remedy)
    tokens = tuple(value)
    if set(map(type, tokens)) - {int}:
        tokens = tuple(_index(token, i, field, remedy) for i, token in enumerate(tokens))
    if tokens and min(tokens) < 0:
        raise RequestError(field, f"{min(tokens)} is no token id", remedy)
    return tokens


def _index(token: Any, place: int, field: str, remedy: str) -> int:
    try:
        if not isinstance(token, bool):
            return operator.index(token)
    except TypeError:
        pass
    raise RequestError(field, f"{short(token)} at place {place} is no token id", remedy)


def check_temperature(temperature: object) -> None:
    """Raise RequestError unless this is 0 or a temperature that float32 can divide logits by."""
    if not (is_number(temperature) and (temperature == 0 or MIN_TEMPERATURE <= temperature < MAX_TEMPERATURE)):  # type: ignore[operator]
        raise RequestError("temperature", f"{short(temperature)} is neither 0 nor in {MIN_TEMPERATURE}..{MAX_TEMPERATURE:g}",
                           "use 0 for greedy")
