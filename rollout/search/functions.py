"""How answers are found in texts and texts are scored: the built-in ways, and functions that a user names as `module:function`.

This module imports neither torch nor Ray.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Callable
from typing import Any

from ...errors import InvalidInput, RequestError
from ...model.arguments import short
from ...model.tasks import answer

AnswerFunction = Callable[[str], Any]
"""f(text) -> the answer as text or a number, None where there is none."""
ScoreFunction = Callable[[str, str], float]
"""f(prompt, text) -> a finite number, larger for better texts."""
_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_WHOLE = re.compile(r"[+-]?\d{1,400}")
MAX_ANSWER = 1000
"""Characters of an answer; the rest is cut off."""


def is_reference(value: object) -> bool:
    """Whether this is written like `module:function`."""
    return isinstance(value, str) and _REFERENCE.fullmatch(value) is not None


def load_function(reference: str, field: str) -> Callable[..., Any]:
    """The function that `module:function` names. The working directory is searched for modules too, as Python does for scripts.

    Raises:
        InvalidInput: there is no such module or function, or the module raises an error. `field` is what the error calls it.
    """
    if not is_reference(reference):
        raise InvalidInput(field, f"{short(reference)} names no function", "write it as module:function")
    name, _, path = reference.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(name)
    except Exception as error:  # whatever a user's module raises
        said = " ".join(str(error).split())
        raise InvalidInput(field, f"module {name!r} cannot be imported ({type(error).__name__}: {said})",
                           "check its name, and that it can be imported from here") from error  # fmt: skip
    for part in path.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise InvalidInput(field, f"module {name!r} has no function {path!r}", "check its name")
    return found


def canonical(found: object) -> str | None:
    """An answer in the form in which answers are compared: without blanks around and between words doubled, whole numbers without
    signs and zeros that change nothing. None for an empty one."""
    text = " ".join(str(found)[:MAX_ANSWER].split()).removesuffix(".")
    if _WHOLE.fullmatch(text):
        return str(int(text))
    return text or None


def answer_function(name: str) -> Callable[[str], str | None]:
    """The function of `SearchConfig.answer`: text -> canonical answer, or None."""
    extract: AnswerFunction = answer if name == "task" else str if name == "text" else load_function(name, "answer")

    def found(text: str) -> str | None:
        return _called(lambda: None if (value := extract(text)) is None else canonical(value), "answer", name)

    return found


def score_function(name: str) -> ScoreFunction | None:
    """The function of `SearchConfig.scorer`; None for the built-in scores."""
    if not is_reference(name):
        return None
    scorer = load_function(name, "scorer")

    def score(prompt: str, text: str) -> float:
        return checked_score(_called(scorer, "scorer", name, prompt, text), name)

    return score


def checked_score(value: Any, name: str) -> float:
    """A score as a number. Raises RequestError where it is not finite."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RequestError("scorer", f"{name} returned {short(value)}", "return a finite number")
    return number


def _called(function: Callable[..., Any], field: str, name: str, *arguments: str) -> Any:
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:  # whatever a user's function raises
        raise RequestError(field, f"{name} raised {type(error).__name__} ({short(str(error))})",
                           "make it return for any text") from error  # fmt: skip
