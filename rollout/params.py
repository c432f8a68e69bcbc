"""SamplingParams: how the tokens of a request are drawn, in vLLM's names.

Each token is drawn from the policy's logits in this order:

1. `min_tokens` forbids the stop tokens, `logit_bias` adds to logits, then each of `logits_processors` is called.
2. `repetition_penalty`, `frequency_penalty` and `presence_penalty`.
3. `temperature`, then `top_k`, `top_p` and `min_p`.

The tokens before a drafted one are the committed ones and the drafts before it. So every sampler keeps its guarantee: `coupled`
gives the tokens of `ar`, and `lossless` is distributed as p after these three steps.

Two log-probabilities are recorded. `logprob` is log p at the temperature over the full vocabulary, without steps 1 and 2 and
without the cut-offs of step 3: trainers recompute it from the policy alone. `behavior_logprob` is under the distribution that the
token was drawn from, with all three steps. `support_logmass` is the mass inside the cut-offs of that distribution.

This module imports neither torch nor Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..errors import RequestError
from ..seeds import MAX_SEED

SAMPLERS = ("ar", "lossless", "coupled", "mixed")
SamplerName = Literal["ar", "lossless", "coupled", "mixed"]
LogitsProcessor = Callable[[list[int], Any], Any]
"""f(prefix_tokens, logits_V) -> logits_V. `prefix_tokens` are the prompt and all tokens before the one to be drawn. `logits_V` is
a float32 (or float64) tensor that the function may change. It is called for drafted tokens too, so it must be a pure function."""

MAX_BIAS = 1e6
"""Largest size of a logit bias: float32 still tells biased logits apart by 1/16, and no sum with logits overflows."""
REPETITION = (1e-3, 1e3)
"""Least and largest repetition penalty: a logit of 1e6 divided or multiplied by it, then divided by a temperature, stays below
the largest float32."""
MIN_TEMPERATURE = 1e-6
"""Least temperature above 0: a logit of 1e9 divided by it stays below the largest float32."""
MAX_STOP = 256
"""Bytes of the longest stop string."""


def require(condition: bool, name: str, problem: str, remedy: str) -> None:
    """Raise the RequestError of field `name` unless the condition holds."""
    if not condition:
        raise RequestError(name, problem, remedy)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of a request are drawn.

    Attributes:
        sampler: `ar` (reference), `lossless` (rejection; distributed exactly as p), `coupled` (shared Gumbel noise; the
            same tokens as `ar` with the same seed) or `mixed` (a blend of p and q; faster, its own distribution).
        temperature: 0 (greedy), or from 1e-6 to below 1e4.
        top_k: keep the k most probable tokens; 0 keeps all, and so does -1, which becomes 0.
        top_p: keep the smallest set of tokens whose probability reaches top_p, in (0, 1].
        min_p: drop tokens less probable than min_p times the most probable one, in [0, 1).
        mix_weight: weight w of p's logits in `mixed`, in [0, 1].
        max_tokens: most tokens generated per sample, >= 1.
        stop_token_ids: a sample ends after any of these; the stop token is part of the sample.
        ignore_eos: go on past the policy's own end-of-sequence tokens.
        routed_experts: record which expert each layer chose for each row of the sequence.
        n: samples per prompt, >= 1.
        seed: seed of the request, 0 <= seed < 2**63; None for one made of the request's id.
        stop: strings; a sample ends with the token that completes one of them. That token is the last one of `tokens` and of the
            log-probabilities; the text is cut before the string.
        include_stop_str_in_output: cut the text after the stop string.
        min_tokens: the sample cannot end by a stop token or a stop string before this many tokens, in 0..max_tokens.
        logit_bias: what is added to the logits of tokens, as {token id: number in -1e6..1e6}; kept as sorted pairs.
        repetition_penalty: in 1e-3..1e3; positive logits of tokens in the prompt or the sample are divided by it,
            negative ones are multiplied by it.
        presence_penalty: in -2..2; subtracted from the logits of tokens in the sample.
        frequency_penalty: in -2..2; subtracted once for each time a token is in the sample.
        logprobs: also record the k most probable tokens at each generated token, by `logprob`; None or 0 for none.
        prompt_logprobs: record `logprob` of the prompt tokens from the second on, and the k most probable tokens there; None for
            neither.
        logits_processors: functions f(prefix_tokens, logits_V) -> logits_V (`LogitsProcessor`). They cannot travel to another
            process.
    """

    sampler: SamplerName = "lossless"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    mix_weight: float = 0.5
    max_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    routed_experts: bool = False
    n: int = 1
    seed: int | None = None
    stop: tuple[str, ...] | list[str] | str = ()
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    logit_bias: tuple[tuple[int, float], ...] | Mapping[int, float] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logits_processors: tuple[LogitsProcessor, ...] | list[LogitsProcessor] = ()

    def __post_init__(self) -> None:
        require(self.sampler in SAMPLERS, "sampler", f"unknown sampler {self.sampler!r}",
                f"use one of {', '.join(SAMPLERS)}")
        require(self.temperature == 0 or MIN_TEMPERATURE <= self.temperature < 1e4, "temperature",
                f"{self.temperature} is neither 0 nor in {MIN_TEMPERATURE}..10000", "use 0 for greedy")
        require(-1 <= self.top_k < 2**31, "top_k", f"{self.top_k} is outside -1..2**31-1", "use 0 or -1 to keep every token")
        object.__setattr__(self, "top_k", max(self.top_k, 0))
        require(0.0 < self.top_p <= 1.0, "top_p", f"{self.top_p} is outside (0, 1]", "use 1.0 to keep every token")
        require(0.0 <= self.min_p < 1.0, "min_p", f"{self.min_p} is outside [0, 1)", "use 0 to keep every token")
        require(0.0 <= self.mix_weight <= 1.0, "mix_weight", f"{self.mix_weight} is outside [0, 1]",
                "1.0 samples from p alone, 0.0 from q alone")
        require(self.max_tokens >= 1, "max_tokens", f"{self.max_tokens} is less than 1", "ask for at least one token")
        require(_whole(self.n) and self.n >= 1, "n", f"{self.n!r} is no whole number >= 1", "ask for at least one sample")
        require(self.seed is None or (_whole(self.seed) and 0 <= self.seed <= MAX_SEED), "seed",
                f"{self.seed!r} is no whole number in 0..2**63-1", "use a 63-bit seed, or None for one made of the id")
        require(_whole(self.min_tokens) and 0 <= self.min_tokens <= self.max_tokens, "min_tokens",
                f"{self.min_tokens!r} is no whole number in 0..max_tokens ({self.max_tokens})", "use 0 for no minimum")
        require(_number(self.repetition_penalty) and REPETITION[0] <= self.repetition_penalty <= REPETITION[1],
                "repetition_penalty", f"{self.repetition_penalty!r} is outside {REPETITION[0]}..{REPETITION[1]}",
                "use 1.0 for no penalty")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            require(_number(value) and -2 <= value <= 2, name, f"{value!r} is outside -2..2", "use 0 for no penalty")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            require(value is None or (_whole(value) and 0 <= value < 2**15), name, f"{value!r} is no whole number in 0..32767",
                    "use None to record no alternatives")
        self._normalise()

    def _normalise(self) -> None:
        """Collections become tuples, so that the parameters can be hashed and compared; None, vLLM's default, is an empty one."""
        for name in ("stop", "stop_token_ids", "logit_bias", "logits_processors"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, ())
        if type(self.stop_token_ids) is not tuple:
            object.__setattr__(self, "stop_token_ids", _tuple("stop_token_ids", self.stop_token_ids, "give a list of token ids"))
        if type(self.stop) is not tuple or self.stop:
            stop = (self.stop,) if isinstance(self.stop, str) else _tuple("stop", self.stop, "give text, or a list of texts")
            for text in stop:
                require(isinstance(text, str) and 0 < len(text.encode(errors="replace")) <= MAX_STOP, "stop",
                        f"{text!r:.40} is no text of 1 to {MAX_STOP} bytes", "give short texts, or stop_token_ids")
            object.__setattr__(self, "stop", stop)
        if type(self.logit_bias) is not tuple or self.logit_bias:
            object.__setattr__(self, "logit_bias", _pairs(self.logit_bias))
        if type(self.logits_processors) is not tuple or self.logits_processors:
            processors = _tuple("logits_processors", self.logits_processors, "give a list of functions")
            for processor in processors:
                require(callable(processor), "logits_processors", f"{processor!r:.40} cannot be called",
                        "give functions f(prefix_tokens, logits) -> logits")
            object.__setattr__(self, "logits_processors", processors)

    @property
    def adjusts(self) -> bool:
        """Something changes the logits before the temperature (steps 1 and 2 above)."""
        return bool(self.min_tokens or self.logit_bias or self.logits_processors or self.penalises)

    @property
    def penalises(self) -> bool:
        """Tokens already there change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _tuple(name: str, value: Any, remedy: str) -> tuple[Any, ...]:
    require(isinstance(value, Iterable) and not isinstance(value, bytes), name, f"{value!r:.40} is no list", remedy)
    return tuple(value)


def _pairs(bias: Any) -> tuple[tuple[int, float], ...]:
    """The biases as (token id, number), sorted by token."""
    pairs = bias.items() if isinstance(bias, Mapping) else bias
    remedy = "give {token id: number}"
    try:
        found = [(token, value) for token, value in pairs]
    except (TypeError, ValueError):
        raise RequestError("logit_bias", f"{bias!r:.40} is no mapping of token ids to numbers", remedy) from None
    for token, value in found:
        require(_whole(token) and token >= 0, "logit_bias", f"{token!r:.40} is no token id", remedy)
        require(_number(value) and abs(value) <= MAX_BIAS, "logit_bias",
                f"{value!r:.40} of token {token} is outside -{MAX_BIAS:g}..{MAX_BIAS:g}",
                "use -1000 to ban a token, 1000 to force it")
    require(len({token for token, _ in found}) == len(found), "logit_bias", "a token is given twice", remedy)
    return tuple(sorted((int(token), float(value)) for token, value in found))
