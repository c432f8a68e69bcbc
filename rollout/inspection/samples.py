"""A line of samples, checked and packed: one sample, or the candidates of a search (`blockroll sample --candidates`).

Invariants:
- Whatever a line holds, the outcome is a sample or one DataError that names the file, the line, the field and the remedy.
- Only `tokens` is required. What a line leaves out is shown as not recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import DataError
from ..types import StepTrace
from .origins import ENVIRONMENT, Steps, origins_of, steps_of

MAX_TOKEN_ID = 2**31 - 1
NO_VERSION = -1
"""Version of a token that no policy made."""
Encode = Callable[[str], Sequence[int]]
"""A text as token ids."""
MAX_NAME = 200
"""Characters of an id or a finish reason that the page shows."""


@dataclass(frozen=True, slots=True)
class InspectedSample:
    """One sample.

    Attributes:
        name: id of its request; samples with one name and step are a group.
        prompt, tokens: uint32 each.
        logprobs, behavior, entropy: float32[N], NaN at tokens of the environment, or None where they are not known.
        versions: int32[N], NO_VERSION at tokens of the environment, or None.
        origin: uint8[N], as `origins.ORIGINS`.
        steps: its decode steps, or None.
        forwards: forward passes of decoding; None where neither the line nor its trace says.
        text: the generated text as the line has it, or None.
    """

    name: str
    number: int
    step: int | None
    reward: float | None
    advantage: float | None
    finish: str
    prompt: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray | None
    behavior: np.ndarray | None
    versions: np.ndarray | None
    origin: np.ndarray
    steps: Steps | None
    forwards: int | None
    text: str | None
    entropy: np.ndarray | None = None


def samples_of(record: Mapping[str, Any], place: str, number: int, encode: Encode | None) -> list[InspectedSample]:
    """The samples of a line.

    Args:
        place: file and line, for errors.
        number: of the line, which names a sample without `id`.
        encode: the tokenizer, for candidates that are texts; None without one.
    """
    candidates = record.get("candidates")
    if candidates is None:
        return [sample_of(record, place, number)]
    line = _Line(record, place)
    if not isinstance(candidates, list) or not all(isinstance(candidate, dict) for candidate in candidates):
        raise line.error("candidates", "not a list of objects", "write them with `blockroll sample --candidates`")
    found = []
    for i, candidate in enumerate(candidates):
        if not isinstance(candidate.get("tokens"), list):
            text = candidate.get("text")
            if not isinstance(text, str) or encode is None:
                remedy = "name the policy (--policy)" if isinstance(text, str) else "give its tokens, or its text"
                raise line.error(f"candidates[{i}]", "holds no list of tokens", remedy)
            candidate = {**candidate, "tokens": list(encode(text))}
        named = {"id": record.get("id"), "sample": i, "reward": candidate.get("score"), **candidate}
        found.append(sample_of(named, f"{place}: candidates[{i}]", number))
    return found


def sample_of(record: Mapping[str, Any], place: str, number: int) -> InspectedSample:
    """The sample of a line; arguments as `samples_of`."""
    line = _Line(record, place)
    tokens = line.ids("tokens")
    if tokens is None:
        raise line.error("tokens", "missing", "give lines as `blockroll generate` writes them")
    prompt = line.ids("prompt_tokens")
    prompt = np.zeros(0, dtype=np.uint32) if prompt is None else prompt
    trace, mask, forwards = line.trace(len(prompt), len(tokens)), line.env_mask(len(tokens)), line.whole("forwards")
    steps = None if trace is None else steps_of(trace, len(prompt), len(tokens))
    origin = origins_of(steps, len(tokens), mask)
    logprobs, behavior = (line.numbers(name, len(tokens)) for name in ("logprobs", "behavior_logprobs"))
    for values in (logprobs, behavior):
        if values is not None:
            values[origin == ENVIRONMENT] = np.nan
    return InspectedSample(
        name=line.word("id", str(number)), number=line.whole("sample") or 0, step=line.whole("step"),
        reward=line.number("reward"), advantage=line.number("advantage"), finish=line.word("finish_reason", ""),
        prompt=prompt, tokens=tokens, logprobs=logprobs,
        behavior=behavior, versions=line.versions(len(tokens)), origin=origin, steps=steps,
        forwards=int(steps.forwards.sum()) if forwards is None and steps is not None else forwards,
        text=record["text"] if isinstance(record.get("text"), str) else None,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Line:
    record: Mapping[str, Any]
    place: str

    def error(self, field: str, problem: str, remedy: str = "give lines as `blockroll generate` writes them") -> DataError:
        return DataError(f"{self.place}: {field}", problem, remedy)

    def ids(self, field: str) -> np.ndarray | None:
        values = self.record.get(field)
        if values is None:
            return None
        if not isinstance(values, list) or not all(type(value) is int and 0 <= value <= MAX_TOKEN_ID for value in values):
            raise self.error(field, "not a list of token ids")
        return np.array(values, dtype=np.uint32)

    def numbers(self, field: str, count: int) -> np.ndarray | None:
        values = self.record.get(field)
        if values is None:
            return None
        if not isinstance(values, list) or not all(_is_number(value) for value in values):
            raise self.error(field, "not a list of numbers")
        if len(values) != count:
            raise self.error(field, f"{len(values)} numbers for {count} tokens")
        with np.errstate(over="ignore"):
            found = np.array(values, dtype=np.float32)
        if not np.isfinite(found).all():
            raise self.error(field, "a number beyond float32")
        return found

    def versions(self, count: int) -> np.ndarray | None:
        values = self.numbers("versions", count)
        if values is None:
            return None
        if not all(type(value) is int and NO_VERSION <= value < 2**31 for value in self.record["versions"]):
            raise self.error("versions", "not a list of whole numbers below 2**31")
        return np.array(self.record["versions"], dtype=np.int32)

    def env_mask(self, count: int) -> list[int] | None:
        values = self.numbers("env_mask", count)
        if values is not None and not np.isin(values, (0, 1)).all():
            raise self.error("env_mask", "holds other numbers than 0 and 1", "give 1 for the policy's tokens, 0 for others")
        return None if values is None else values.astype(int).tolist()

    def trace(self, prompt: int, tokens: int) -> list[Sequence[int]] | None:
        rows = self.record.get("trace")
        if rows is None:
            return None
        width, last = len(StepTrace._fields), prompt - 1
        if not isinstance(rows, list):
            raise self.error("trace", "not a list of rows")
        for row in rows:
            if not isinstance(row, list) or len(row) != width or not all(type(v) is int and -1 <= v < 2**31 for v in row):
                raise self.error("trace", f"a row is not {width} whole numbers")
            anchor, drafted, accepted, start, *_ = row
            if not last <= anchor < prompt + tokens - 1 or not 0 <= accepted <= drafted < 256 or (drafted and start > anchor + 1):
                raise self.error("trace", "a row does not fit the tokens")
            last = anchor + accepted + 1
        return rows

    def whole(self, field: str) -> int | None:
        value = self.record.get(field)
        if value is not None and (type(value) is not int or not 0 <= value < 2**31):
            raise self.error(field, "no whole number from 0", "give a whole number, or leave it out")
        return value

    def number(self, field: str) -> float | None:
        value = self.record.get(field)
        if value is not None and not _is_number(value):
            raise self.error(field, "no finite number", "give a number, or leave it out")
        return None if value is None else float(value)

    def word(self, field: str, default: str) -> str:
        value = self.record.get(field)
        if value is None:
            return default
        if type(value) not in (str, int):
            raise self.error(field, "neither text nor a whole number", "give text")
        return str(value)[:MAX_NAME]


def _is_number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False
