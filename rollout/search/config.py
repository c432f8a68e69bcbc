"""What a search does, as one frozen object that is checked when it is made.

This module imports neither torch nor Ray. `SearchConfig.from_mapping` makes one of JSON, for instance of an HTTP body.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from ...errors import RequestError
from ...model.arguments import is_number, is_whole, require, short
from ...seeds import MAX_SEED
from ..params import MAX_STOP
from .functions import is_reference

MethodName = Literal["best_of_n", "majority", "weighted_vote", "self_consistency", "beam", "markovian_rsa", "budget_forcing"]
METHODS: tuple[MethodName, ...] = (
    "best_of_n", "majority", "weighted_vote", "self_consistency", "beam", "markovian_rsa", "budget_forcing",
)  # fmt: skip
STOPS = ("beta", "dirichlet", "certain")
ANSWERS = ("task", "text")
SCORERS = ("logprob", "mean_logprob", "verifier")
MAX_SAMPLES = 4096
"""Samples of a search: all their tokens are kept until it ends."""
MAX_TEXT = 4096
"""Characters of a text that is put into prompts."""
_SCORED = ("best_of_n", "weighted_vote", "beam")
_OF_METHOD: dict[str, tuple[str, ...]] = {
    "scorer": _SCORED, "confidence": ("self_consistency",), "stop_rule": ("self_consistency",), "width": ("beam",),
    "step_end": ("beam",), "aggregate": ("markovian_rsa",), "rounds": ("markovian_rsa",), "tail": ("markovian_rsa",),
    "aggregation": ("markovian_rsa",), "force": ("budget_forcing",), "answer_tokens": ("budget_forcing",),
    "extend": ("budget_forcing",), "extensions": ("budget_forcing",),
}  # fmt: skip
"""Fields that have a meaning for some methods only."""
AGGREGATION = (
    "{question}\n\nHere are candidate solutions; of each you see the end. They may be wrong.\n{candidates}\n\n"
    "Consider them, and write the best solution.\n{question}"
)
"""In the report's words: the prompt asks the model to consider the candidates and to produce the best solution."""


@dataclass(frozen=True, slots=True)
class SearchConfig:
    """A search and its budget.

    Attributes:
        method: one of METHODS; each has a file of its name, the votes share `votes`.
        samples: samples per question, candidates per round (`markovian_rsa`), beams (`beam`); None for as many as a budget
            affords. `budget_forcing` makes one.
        budget_tokens: most generated tokens per question. budget_seconds: most seconds per question, by the clock.
        seed: 0 <= seed < 2**63. Sample j of a question draws from (seed, the question's id, j) alone, whatever method,
            budget and batch.
        answer: how an answer is found in a text: `task` (after the last `A:`), `text` (all of it), or `module:function`, a
            function f(text) -> answer or None.
        scorer: `logprob` (sum of the policy's log-probabilities), `mean_logprob`, `verifier` (the question's own), or
            `module:function`, a function f(prompt, text) -> number.
        stop_rule, confidence: of `self_consistency`: which posterior is asked, and how sure it must be.
        width: samples per beam and step of `beam`. step_end: the text that ends a step.
        aggregate, rounds, tail: C, T and tau of `markovian_rsa`; tail None for half of max_tokens. aggregation: the prompt,
            with {question} and {candidates}.
        force: text that `budget_forcing` puts where the answer must begin. answer_tokens: kept for the answer. extend,
            extensions: text that is put in place of an early answer, and how many times.
    """

    method: MethodName = "majority"
    samples: int | None = 16
    budget_tokens: int | None = None
    budget_seconds: float | None = None
    seed: int = 0
    answer: str = "task"
    scorer: str = "logprob"
    stop_rule: Literal["beta", "dirichlet", "certain"] = "beta"
    confidence: float = 0.95
    width: int = 4
    step_end: str = ";"
    aggregate: int = 4
    rounds: int = 2
    tail: int | None = None
    aggregation: str = AGGREGATION
    force: str = "\nA:"
    answer_tokens: int = 16
    extend: str = "\nWait"
    extensions: int = 0

    def __post_init__(self) -> None:
        self._among("method", METHODS)
        self._whole("samples", 1, MAX_SAMPLES, optional=True)
        self._whole("budget_tokens", 1, 2**63 - 1, optional=True)
        self._whole("seed", 0, MAX_SEED)
        seconds = self.budget_seconds
        require(seconds is None or (is_number(seconds) and 0 < seconds < math.inf), "budget_seconds",
                f"{short(seconds)} is no number above 0", "give seconds, or leave it out")
        require(self.samples is not None or self.budget_tokens is not None or seconds is not None, "samples",
                "None, and there is no budget", "give samples, budget_tokens or budget_seconds")
        require(self.samples is not None or self.method not in ("beam", "markovian_rsa"), "samples",
                f"None, and {self.method} needs a number", "give a number, such as 16")
        self._among("stop_rule", STOPS)
        require(is_number(self.confidence) and 0.5 < self.confidence < 1, "confidence",
                f"{short(self.confidence)} is outside 0.5..1", "use a number such as 0.95")
        for name, least, most in (("width", 1, 256), ("aggregate", 1, 256), ("rounds", 0, 64), ("answer_tokens", 1, 2**31),
                                  ("extensions", 0, 64)):  # fmt: skip
            self._whole(name, least, most)
        self._whole("tail", 1, 2**31, optional=True)
        for name in ("step_end", "aggregation", "force", "extend"):
            text = getattr(self, name)
            require(isinstance(text, str) and 0 < len(text) <= MAX_TEXT, name,
                    f"{short(text)} is no text of 1 to {MAX_TEXT} characters", "give some text")
        for name in ("step_end", "force"):  # samples stop there
            text = getattr(self, name)
            require(len(text.encode(errors="replace")) <= MAX_STOP, name, f"{short(text)} has more than {MAX_STOP} bytes",
                    "give a short text")
        require("{question}" in self.aggregation and self.aggregation.count("{candidates}") == 1, "aggregation",
                f"{short(self.aggregation)} lacks {{question}} or has not one {{candidates}}", "write both in braces")
        for name, known in (("answer", ANSWERS), ("scorer", SCORERS)):
            value = getattr(self, name)
            require(isinstance(value, str) and (value in known or is_reference(value)), name, f"unknown {name} {short(value)}",
                    f"use {', '.join(known)}, or module:function")
        require(self.method != "markovian_rsa" or self.samples is None or self.aggregate <= self.samples, "aggregate",
                f"{self.aggregate} is more than the {self.samples} candidates of a round", "lower it, or raise samples")

    @property
    def scores(self) -> bool:
        """Whether the method asks the scorer."""
        return self.method in _SCORED

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, functions: bool = False) -> SearchConfig:
        """The configuration that a mapping, such as a JSON object, holds.

        Args:
            functions: whether `answer` and `scorer` may name a function as `module:function`. Never allow it to someone
                who may not run code here.

        Raises:
            RequestError: an unknown key, a value that cannot be used, a key of another method, or a function that may not be
            named.
        """
        require(isinstance(values, Mapping), "search", f"{short(values)} is no mapping", "give names and values")
        known = [field.name for field in fields(cls)]
        for name, value in values.items():
            require(name in known, "search", f"unknown key {short(name)}", f"use some of {', '.join(known)}")
            require(functions or name not in ("answer", "scorer") or not is_reference(value), name,
                    f"{short(value)} names a function", f"use {', '.join(ANSWERS if name == 'answer' else SCORERS)} here")
        config = cls(**values)
        for name in values:
            owners = _OF_METHOD.get(name, METHODS)
            require(config.method in owners, name, f"given with method {config.method}",
                    f"leave it out; it is of {', '.join(owners)}")
        return config

    def _among(self, name: str, known: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if not isinstance(value, str) or value not in known:
            raise RequestError(name, f"unknown {name} {short(value)}", f"use one of {', '.join(known)}")

    def _whole(self, name: str, least: int, most: int, optional: bool = False) -> None:
        value = getattr(self, name)
        require((optional and value is None) or (is_whole(value) and least <= value <= most), name,
                f"{short(value)} is no whole number in {least}..{most}", "use a number in that range")
