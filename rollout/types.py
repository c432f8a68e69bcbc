"""What goes into an engine and what comes out of it.

Invariants:
- Plain frozen dataclasses over Python numbers, tuples and NumPy arrays: importable without torch, Ray and pyzmq, so the
  same objects travel from a trainer's process to an engine and back.
- A request is validated when it is made; nothing below re-checks it except what only a policy knows (vocabulary size,
  maximum length).
- A trajectory is a function of (weights, prompt, seed, sampling parameters) for `ar` and `coupled`, and also of the
  schedule for `lossless` and `mixed`.

Legend: P = prompt tokens, N = generated tokens of one sample, L = layers, K = alternatives recorded per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from ..errors import RequestError
from ..model.arguments import is_whole, short, token_ids
from ..seeds import MAX_SEED, derived_seed
from .params import MAX_SAMPLES, SamplingParams
from .params import SAMPLERS as SAMPLERS
from .params import SamplerName as SamplerName
from .stop_strings import cut_text

FinishReason = Literal["stop", "length", "abort"]
MAX_SALT = 256
"""Bytes of the longest `cache_salt`: it is part of the key of every kept page that begins a text."""


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """One prompt and the group of samples wanted for it.

    Attributes:
        id: the caller's own name for the request; the same id is the same request for ever.
        prompt_tokens: token ids, at least one.
        seed: 0 <= seed < 2**63; sample i of the group draws its numbers from (seed, i) alone. None, the default, becomes the seed
            of the parameters. Where they have none it becomes `derived_seed(0, id)`: the same id has the same seed in every
            process, other ids have others.
        samples: size of the group, >= 1. None, the default, becomes `n` of the parameters.
        priority: of the requests of one client that wait for an engine, those with the least number go first; -2**31..2**31-1.
        cache_salt: requests reuse K/V of requests with the same salt alone; at most 256 bytes of text.
    """

    id: str
    prompt_tokens: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    seed: int = cast(int, None)
    samples: int = cast(int, None)
    priority: int = 0
    cache_salt: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id:
            raise RequestError("id", f"{short(self.id)} is no text of at least one character",
                               "name each request; the name survives restarts")  # fmt: skip
        if not isinstance(self.params, SamplingParams):
            raise RequestError("params", f"{short(self.params)} is no SamplingParams", "give SamplingParams(...)")
        object.__setattr__(self, "prompt_tokens", token_ids(self.prompt_tokens, "prompt_tokens"))
        if not self.prompt_tokens:
            raise RequestError("prompt_tokens", f"request {short(self.id)} has no prompt tokens",
                               "give at least one token, for instance the beginning-of-sequence token")  # fmt: skip
        if self.seed is None:
            object.__setattr__(self, "seed", derived_seed(0, self.id) if self.params.seed is None else self.params.seed)
        if not is_whole(self.seed) or not 0 <= self.seed <= MAX_SEED:
            raise RequestError("seed", f"{short(self.seed)} is no whole number in 0..2**63-1",
                               "use a 63-bit seed, or None for one made of the id")  # fmt: skip
        object.__setattr__(self, "seed", int(self.seed))
        if self.samples is None:
            object.__setattr__(self, "samples", self.params.n)
        if not is_whole(self.samples) or not 1 <= self.samples <= MAX_SAMPLES:
            raise RequestError("samples", f"{short(self.samples)} is no whole number in 1..{MAX_SAMPLES}",
                               "ask for at least one sample, and for more in several requests")  # fmt: skip
        object.__setattr__(self, "samples", int(self.samples))
        if type(self.priority) is not int or self.priority:
            if not is_whole(self.priority) or not -(2**31) <= self.priority < 2**31:
                raise RequestError("priority", f"{short(self.priority)} is no whole number in -2**31..2**31-1",
                                   "use 0, or less for a request that goes first")  # fmt: skip
            object.__setattr__(self, "priority", int(self.priority))
        salt = self.cache_salt
        if salt != "" and not (isinstance(salt, str) and _is_unicode(salt) and len(salt.encode()) <= MAX_SALT):
            raise RequestError("cache_salt", f"{short(salt)} is no text of at most {MAX_SALT} bytes",
                               "give a short text, such as a random one per user")  # fmt: skip


def _is_unicode(text: str) -> bool:
    """Whether the text has no halves of surrogate pairs, which no encoding takes."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


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


@dataclass(slots=True, repr=False)
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
        stop_reason: what ended the sample where finish_reason is `stop`: the stop string, or the stop token's id.
        stop_included: the text ends after the stop string (`include_stop_str_in_output`).
        top_tokens, top_logprobs: int32[N, K], float32[N, K], the K most probable tokens at each generated token, most probable
            first, by the convention of `logprobs`; or those of SamplingParams.logprob_token_ids, in that order. None unless the
            parameters ask for them.
        prompt_logprobs: float32[P - 1], by the same convention, of the prompt tokens from the second on.
        prompt_top_tokens, prompt_top_logprobs: int32[P - 1, K], float32[P - 1, K], the most probable tokens there. All three are
            None unless SamplingParams.prompt_logprobs asks for them.
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
    stop_reason: int | str | None = None
    stop_included: bool = False
    top_tokens: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    prompt_logprobs: np.ndarray | None = None
    prompt_top_tokens: np.ndarray | None = None
    prompt_top_logprobs: np.ndarray | None = None

    @classmethod
    def aborted(cls, request: RolloutRequest, sample: int) -> Trajectory:
        """A sample that was ended before an engine had begun it."""
        none, cut = np.zeros(0, dtype=np.float32), request.params
        cuts = cut.temperature > 0 and (cut.top_k > 0 or cut.top_p < 1 or cut.min_p > 0)
        return cls(
            request.id, sample, request.prompt_tokens, [], none, none, np.zeros(0, dtype=np.int32), np.zeros(0, dtype=bool),
            "abort", 0, support_logmass=none if cuts else None, stop_included=cut.include_stop_str_in_output,
        )  # fmt: skip

    def __repr__(self) -> str:
        tokens = ", ".join(map(str, self.tokens[:6])) + (", ..." if len(self.tokens) > 6 else "")
        return (f"Trajectory({self.request_id!r}, sample={self.sample}, tokens=[{tokens}] ({len(self.tokens)}), "
                f"finish_reason={self.finish_reason!r}, tokens_per_forward={self.tokens_per_forward:.2f})")  # fmt: skip

    def text(self, tokenizer: Any) -> str:
        """The generated text without special tokens. A sample that a stop string ended is cut there.

        Args:
            tokenizer: the policy's own; its `decode` is called.
        """
        stop = self.stop_reason if isinstance(self.stop_reason, str) else None
        return cut_text(tokenizer, self.tokens, stop, self.stop_included)

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
