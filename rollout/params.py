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

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import RequestError
from ..model.arguments import check_temperature, is_number, is_whole, require, short, token_ids
from ..seeds import MAX_SEED

SAMPLERS = ("ar", "lossless", "coupled", "mixed")
SamplerName = Literal["ar", "lossless", "coupled", "mixed"]
LogitsProcessor = Callable[[list[int], Any], Any]
"""f(prefix_tokens, logits_V) -> logits_V. `prefix_tokens` are the prompt and all tokens before the one to be drawn. `logits_V` is
a float32 (or float64) tensor that the function may change. It is called for drafted tokens too, so it must be a pure function."""

MAX_BIAS = 1e6
"""Largest size of a finite logit bias: float32 still tells biased logits apart by 1/16, and no sum with logits overflows. A bias
below -1e6 forbids its token."""
REPETITION = (1e-3, 1e3)
"""Least and largest repetition penalty: a logit of 1e6 divided or multiplied by it, then divided by a temperature, stays below
the largest float32."""
MAX_STOP = 256
"""Bytes of the longest stop string."""
MAX_SAMPLES = 1 << 16
"""Most samples of one request: each is an object of about a kilobyte that waits in the engine. The wire carries no more."""
MAX_LISTED = 1024
"""Most tokens of `logprob_token_ids`: each is a number recorded per generated token."""
_WHOLE = {"top_k": (-1, 2**31 - 1), "max_tokens": (1, 2**63 - 1), "n": (1, MAX_SAMPLES), "min_tokens": (0, 2**63 - 1)}
_NUMBERS = {"presence_penalty": (-2, 2), "frequency_penalty": (-2, 2), "repetition_penalty": REPETITION, "mix_weight": (0, 1)}
"""Fields that are whole numbers, and those that are numbers, with the least and the largest."""
_FLAGS = ("ignore_eos", "routed_experts", "include_stop_str_in_output")
_REMEDIES = {
    "top_k": "use 0 or -1 to keep every token", "max_tokens": "ask for at least one token", "n": "ask for at least one sample",
    "min_tokens": "use 0 for no minimum", "presence_penalty": "use 0 for no penalty", "frequency_penalty": "use 0 for no penalty",
    "repetition_penalty": "use 1.0 for no penalty", "mix_weight": "1.0 samples from p alone, 0.0 from q alone",
}  # fmt: skip


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
        seed: seed of the request, 0 <= seed < 2**63; None for one made of the request's id. Requests with the same seed draw the
            same random numbers, so their samples are not independent of each other.
        stop: strings; a sample ends with the token that completes one of them. That token is the last one of `tokens` and of the
            log-probabilities; the text is cut before the string.
        include_stop_str_in_output: cut the text after the stop string.
        min_tokens: the sample cannot end by a stop token or a stop string before this many tokens, in 0..max_tokens.
        logit_bias: what is added to the logits of tokens, as {token id: number up to 1e6}; kept as sorted pairs. Anything below
            -1e6 forbids the token and becomes -inf.
        repetition_penalty: in 1e-3..1e3; positive logits of tokens in the prompt or the sample are divided by it,
            negative ones are multiplied by it.
        presence_penalty: in -2..2; subtracted from the logits of tokens in the sample.
        frequency_penalty: in -2..2; subtracted once for each time a token is in the sample.
        logprobs: also record the k most probable tokens at each generated token, by `logprob`; None or 0 for none.
        logprob_token_ids: record these tokens at each generated token, in place of the most probable ones; at most 1,024.
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
    logprob_token_ids: tuple[int, ...] | list[int] = ()

    def __post_init__(self) -> None:
        # Messages are made only where there is an error: parameters are made for each request that arrives.
        if self.sampler not in SAMPLERS:
            raise RequestError("sampler", f"unknown sampler {short(self.sampler)}", f"use one of {', '.join(SAMPLERS)}")
        check_temperature(self.temperature)
        for name, (least, most) in _WHOLE.items():
            value = getattr(self, name)
            if not is_whole(value) or not least <= value <= most:
                raise RequestError(name, f"{short(value)} is no whole number in {least}..{most}", _REMEDIES[name])
        for name, (low, high) in _NUMBERS.items():
            value = getattr(self, name)
            if not is_number(value) or not low <= value <= high:
                raise RequestError(name, f"{short(value)} is outside {low}..{high}", _REMEDIES[name])
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise RequestError(name, f"{short(getattr(self, name))} is neither True nor False", "give one of them")
        if not is_number(self.top_p) or not 0.0 < self.top_p <= 1.0:
            raise RequestError("top_p", f"{short(self.top_p)} is outside (0, 1]", "use 1.0 to keep every token")
        if not is_number(self.min_p) or not 0.0 <= self.min_p < 1.0:
            raise RequestError("min_p", f"{short(self.min_p)} is outside [0, 1)", "use 0 to keep every token")
        if self.seed is not None and not (is_whole(self.seed) and 0 <= self.seed <= MAX_SEED):
            raise RequestError("seed", f"{short(self.seed)} is no whole number in 0..2**63-1",
                               "use a 63-bit seed, or None for one made of the id")  # fmt: skip
        if self.min_tokens > self.max_tokens:
            raise RequestError("min_tokens", f"{self.min_tokens} is no whole number in 0..max_tokens ({self.max_tokens})",
                               _REMEDIES["min_tokens"])  # fmt: skip
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and not (is_whole(value) and 0 <= value < 2**15):
                raise RequestError(name, f"{short(value)} is no whole number in 0..32767", "use None to record no alternatives")
        object.__setattr__(self, "top_k", max(self.top_k, 0))
        self._normalise()

    def _normalise(self) -> None:
        """Collections become tuples, so that the parameters can be hashed and compared; None, vLLM's default, is an empty one."""
        for name in ("stop", "stop_token_ids", "logit_bias", "logits_processors", "logprob_token_ids"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, ())
        if type(self.logprob_token_ids) is not tuple or self.logprob_token_ids:
            listed = token_ids(self.logprob_token_ids, "logprob_token_ids")
            require(len(listed) <= MAX_LISTED, "logprob_token_ids", f"{len(listed)} tokens, at most {MAX_LISTED} are recorded",
                    "leave some out")
            require(not self.logprobs, "logprob_token_ids", f"given beside logprobs={self.logprobs}", "give one of the two")
            object.__setattr__(self, "logprob_token_ids", listed)
        object.__setattr__(self, "stop_token_ids", token_ids(self.stop_token_ids, "stop_token_ids"))
        for name in ("n", "top_k", "max_tokens", "min_tokens", "seed", "logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if type(value) is not int and value is not None:  # NumPy's
                object.__setattr__(self, name, int(value))
        if type(self.stop) is not tuple or self.stop:
            stop = (self.stop,) if isinstance(self.stop, str) else _tuple("stop", self.stop, "give text, or a list of texts")
            for text in stop:
                require(isinstance(text, str) and 0 < len(text.encode(errors="replace")) <= MAX_STOP, "stop",
                        f"{short(text)} is no text of 1 to {MAX_STOP} bytes", "give short texts, or stop_token_ids")
            object.__setattr__(self, "stop", stop)
        if type(self.logit_bias) is not tuple or self.logit_bias:
            object.__setattr__(self, "logit_bias", _pairs(self.logit_bias))
        if type(self.logits_processors) is not tuple or self.logits_processors:
            processors = _tuple("logits_processors", self.logits_processors, "give a list of functions")
            for processor in processors:
                require(callable(processor), "logits_processors", f"{short(processor)} cannot be called",
                        "give functions f(prefix_tokens, logits) -> logits")
            object.__setattr__(self, "logits_processors", processors)

    @property
    def alternatives(self) -> int:
        """Tokens recorded beside each generated one."""
        return len(self.logprob_token_ids) or self.logprobs or 0

    @property
    def adjusts(self) -> bool:
        """Something changes the logits before the temperature (steps 1 and 2 above)."""
        return bool(self.min_tokens or self.logit_bias or self.logits_processors or self.penalises)

    @property
    def penalises(self) -> bool:
        """Tokens already there change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _tuple(name: str, value: Any, remedy: str) -> tuple[Any, ...]:
    listed = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)
    require(listed, name, f"{short(value)} is no list", remedy)
    return tuple(value)


def _pairs(bias: Any) -> tuple[tuple[int, float], ...]:
    """The biases as (token id, number), sorted by token."""
    pairs = bias.items() if isinstance(bias, Mapping) else bias
    remedy = "give {token id: number}"
    try:
        found = [(token, value) for token, value in pairs]
    except (TypeError, ValueError):
        raise RequestError("logit_bias", f"{short(bias)} is no mapping of token ids to numbers", remedy) from None
    for token, value in found:
        require(is_whole(token) and 0 <= token < 2**31, "logit_bias", f"{short(token)} is no token id", remedy)
        require(is_number(value) and value <= MAX_BIAS, "logit_bias",
                f"{short(value)} of token {token} is outside -inf..{MAX_BIAS:g}", "use -inf to forbid a token, 1000 to force it")
    require(len({token for token, _ in found}) == len(found), "logit_bias", "a token is given twice", remedy)
    return tuple(sorted((int(token), float(value) if value >= -MAX_BIAS else -math.inf) for token, value in found))
