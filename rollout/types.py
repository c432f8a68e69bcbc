"""What goes into an engine and what comes out of it.

Invariants:
- Plain frozen dataclasses over Python numbers, tuples and NumPy arrays: importable without torch, Ray and pyzmq, so the
  same objects travel from a trainer's process to an engine and back.
- A request is validated when it is made; nothing below re-checks it except what only a policy knows (vocabulary size,
  maximum length).
- A trajectory is a function of (weights, prompt, seed, sampling parameters) for `ar` and `coupled`, and also of the
  schedule for `lossless` and `mixed`.

Legend: N = generated tokens of one sample, L = layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast

import numpy as np

from ..errors import RequestError
from ..seeds import MAX_SEED, derived_seed

SAMPLERS = ("ar", "lossless", "coupled", "mixed")
SamplerName = Literal["ar", "lossless", "coupled", "mixed"]
FinishReason = Literal["stop", "length", "abort"]


def _require(condition: bool, name: str, problem: str, remedy: str) -> None:
    if not condition:
        raise RequestError(name, problem, remedy)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of a request are drawn.

    Attributes:
        sampler: `ar` (reference), `lossless` (rejection; distributed exactly as p), `coupled` (shared Gumbel noise; the
            same tokens as `ar` with the same seed) or `mixed` (a blend of p and q; faster, its own distribution).
        temperature: >= 0; 0 is greedy.
        top_k: keep the k most probable tokens; 0 keeps all, and so does -1, which becomes 0.
        top_p: keep the smallest set of tokens whose probability reaches top_p, in (0, 1].
        min_p: drop tokens less probable than min_p times the most probable one, in [0, 1).
        mix_weight: weight w of p's logits in `mixed`, in [0, 1].
        max_tokens: most tokens generated per sample, >= 1.
        stop_token_ids: a sample ends after any of these; the stop token is part of the sample.
        ignore_eos: go on past the policy's own end-of-sequence tokens.
        routed_experts: record which expert each layer chose for each row of the sequence.
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

    def __post_init__(self) -> None:
        _require(self.sampler in SAMPLERS, "sampler", f"unknown sampler {self.sampler!r}",
                 f"use one of {', '.join(SAMPLERS)}")
        _require(0.0 <= self.temperature < 1e4, "temperature", f"{self.temperature} is out of range",
                 "use a number >= 0 (0 is greedy)")
        _require(-1 <= self.top_k < 2**31, "top_k", f"{self.top_k} is outside -1..2**31-1", "use 0 or -1 to keep every token")
        object.__setattr__(self, "top_k", max(self.top_k, 0))
        _require(0.0 < self.top_p <= 1.0, "top_p", f"{self.top_p} is outside (0, 1]", "use 1.0 to keep every token")
        _require(0.0 <= self.min_p < 1.0, "min_p", f"{self.min_p} is outside [0, 1)", "use 0 to keep every token")
        _require(0.0 <= self.mix_weight <= 1.0, "mix_weight", f"{self.mix_weight} is outside [0, 1]",
                 "1.0 samples from p alone, 0.0 from q alone")
        _require(self.max_tokens >= 1, "max_tokens", f"{self.max_tokens} is less than 1", "ask for at least one token")


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """One prompt and the group of samples wanted for it.

    Attributes:
        id: the caller's own name for the request; the same id is the same request for ever.
        prompt_tokens: token ids, at least one.
        seed: 0 <= seed < 2**63; sample i of the group draws its numbers from (seed, i) alone. Given as None, the default, it is
            made of the id (`derived_seed(0, id)`): the same id has the same seed in every process, other ids have others.
        samples: size of the group, >= 1.
    """

    id: str
    prompt_tokens: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    seed: int = cast(int, None)
    samples: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_tokens", tuple(int(t) for t in self.prompt_tokens))
        _require(bool(self.id), "id", "empty", "name each request; the name survives restarts")
        _require(len(self.prompt_tokens) >= 1, "prompt_tokens", f"request {self.id!r} has no prompt tokens",
                 "give at least one token, for instance the beginning-of-sequence token")
        _require(min(self.prompt_tokens) >= 0, "prompt_tokens", f"request {self.id!r} has a negative token id",
                 "token ids start at 0")
        if self.seed is None:
            object.__setattr__(self, "seed", derived_seed(0, self.id))
        _require(isinstance(self.seed, int | np.integer) and 0 <= self.seed <= MAX_SEED, "seed",
                 f"{self.seed!r} is no whole number in 0..2**63-1", "use a 63-bit seed, or None for one made of the id")
        object.__setattr__(self, "seed", int(self.seed))
        _require(self.samples >= 1, "samples", f"{self.samples} is less than 1", "ask for at least one sample")


class StepTrace(NamedTuple):
    """One decode step of one sample, enough to rebuild every distribution that took part in it.

    Attributes:
        anchor: position of the anchor, the last token committed before the step.
        drafted: how many drafts were verified (m).
        accepted: how many of them were accepted (a); accepted + 1 tokens were committed (fewer if the sample ended).
        draft_start: first position of the mask block the drafts came from; -1 when drafted is 0.
        draft_length: mask rows of that block. Draft k (at position anchor + k, k >= 1) came from its slot
            anchor + k - draft_start, and the block attended to clean positions < draft_start.
        forwards: forward passes the step made.
    """

    anchor: int
    drafted: int
    accepted: int
    draft_start: int
    draft_length: int
    forwards: int


@dataclass(slots=True)
class Trajectory:
    """One finished sample with everything a trainer needs to learn from it.

    Attributes:
        request_id, sample: which sample of which request.
        tokens: N token ids, the stop token included.
        logprobs: float32[N], log p at the sampling temperature over the full vocabulary (temperature 0: at 1).
        behavior_logprobs: float32[N], under the distribution really sampled from (p with cut-offs, or the mixture).
        support_logmass: float32[N], log of p's mass inside the cut-offs; None when top-k, top-p and min-p are off.
        versions: int32[N], the weight version that made each token.
        finish_reason: `stop`, `length` or `abort`.
        forwards: forward passes of decoding (prefill not counted).
        trace: one entry per decode step.
        from_draft: bool[N], token accepted from a draft (False: resampled or bonus).
        routed_experts: int16[P + N - 1, L] expert per row and layer (num_experts = skip), on request.
    """

    request_id: str
    sample: int
    prompt_tokens: tuple[int, ...]
    tokens: list[int]
    logprobs: np.ndarray
    behavior_logprobs: np.ndarray
    versions: np.ndarray
    from_draft: np.ndarray
    finish_reason: FinishReason
    forwards: int
    trace: tuple[StepTrace, ...] = ()
    support_logmass: np.ndarray | None = None
    routed_experts: np.ndarray | None = None

    @property
    def key(self) -> tuple[str, int]:
        """What makes a trajectory unique: (request id, sample number)."""
        return self.request_id, self.sample

    @property
    def tokens_per_forward(self) -> float:
        """Committed tokens over decode forwards."""
        return len(self.tokens) / max(self.forwards, 1)


def order_by_id(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """Trajectories in the order of their keys, whatever order they arrived in."""
    return sorted(trajectories, key=lambda t: t.key)
