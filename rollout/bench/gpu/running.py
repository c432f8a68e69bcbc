"""An engine in the middle of its work, whose acceptance is forced, and what its steps take by the clock.

Invariants:
- The steps are the engine's own, whole: scheduling, layouts, forwards, verification, commit, drafts. Its samples stand in the
  midst of their texts over a cache of random numbers, as if they had been prefilled; none shares a page with another.
- Verification runs and counts. Only then is the number of accepted drafts replaced: random weights accept nothing worth
  measuring. The numbers are drawn and sent by the host, which costs it a little more than a step of a trained policy does;
  the device is never waited for.

Legend: D samples, R = M + 1 verify rows, M most drafts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ....errors import InvalidInput
from ....kernels.transfer import upload
from ....model.policy import Policy
from ...cache import PagedCache
from ...engine import Engine, EngineConfig
from ...sampling.drafts import Drafts, SamplerRows, Verdict
from ...schedule import Schedule
from ...sequence import Sample
from ...steps import StepRunner
from ...types import RolloutRequest, SamplingParams
from .parts import fill


class ForcedSteps(StepRunner):
    """Steps of `engine`, in which the draft in slot j of its block is accepted with probability `rate_B[j]` if those before it
    were; slots past the end of `rate_B` have its last rate.

    Attributes:
        waited: seconds that the host has waited for verdicts so far.
    """

    def __init__(self, engine: Engine, rate_B: Sequence[float], seed: int = 0) -> None:
        super().__init__(engine.policy, engine.cache, engine.block_size, engine.config.captured)
        self._rate_B, self._draw = np.array(rate_B, dtype=np.float64), np.random.default_rng(seed)
        # A pass that drafts for itself has not told the samples of its block when it is verified.
        self._anchored = engine.schedule.kind == "two_pass"
        self.waited = 0.0

    def _verify(
        self, decoding: Sequence[Sample], rows: SamplerRows, p_logits_DRV: torch.Tensor, drafts: Drafts, anchor_D: torch.Tensor
    ) -> Verdict:
        verdict = super()._verify(decoding, rows, p_logits_DRV, drafts, anchor_D)
        most = drafts.token_SM.shape[1]
        if not most:
            return verdict
        accepted_D = upload(torch.from_numpy(self._accepted(decoding, most)), self.policy.device)
        # Rows of drafts that were rejected hold no token.
        return replace(verdict, accepted_S=accepted_D, token_SR=verdict.token_SR.clamp_min(0))

    def _accepted(self, decoding: Sequence[Sample], most: int) -> np.ndarray:
        """Forced counts. One number per sample decides, drawn from as many strata as there are samples: each count has its
        own distribution, and their mean varies less than that of independent ones."""
        count_D1, slot_D1 = np.array([
            (most, 0) if self._anchored else (min(sample.draft_count, most), sample.anchor + 1 - sample.draft_start)
            for sample in decoding
        ]).T[:, :, None]  # fmt: skip
        line = np.arange(most)
        rate_DM = np.where(line < count_D1, self._rate_B[np.minimum(slot_D1 + line, len(self._rate_B) - 1)], 0.0)
        u_D = (self._draw.permutation(len(decoding)) + self._draw.random(len(decoding))) / len(decoding)
        return (u_D[:, None] < rate_DM.cumprod(1)).sum(1)

    def _heard(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        start = time.perf_counter()
        heard = super()._heard(tensors)
        self.waited += time.perf_counter() - start
        return heard


def engine_for(policy: Policy, schedule: Schedule, batch: int, context: int, tokens: int, page_size: int) -> Engine:
    """An engine about to decode `batch` samples of `context` tokens each, which can take `tokens` more.

    Args:
        schedule: with sizes; `ar` decodes with the sampler of that name, the others with `lossless`.
    Raises:
        InvalidInput: the policy's positions end before that.
    """
    most = policy.config.max_position_embeddings
    if context + tokens > most:
        raise InvalidInput("context", f"{context} and {tokens} tokens are more than the policy's {most}", "give it more")
    pages = batch * -(-(context + tokens) // page_size)
    engine = Engine(policy, EngineConfig(schedule, max_batch=batch, pages=pages, page_size=page_size))
    fill(engine.cache)
    _shuffle(engine.cache)
    draw = torch.Generator().manual_seed(0)
    params = SamplingParams("ar" if schedule.kind == "ar" else "lossless", max_tokens=tokens, ignore_eos=True)
    for i, prompt in enumerate(torch.randint(policy.mask_token_id, (batch, context), generator=draw).tolist()):
        engine.add(RolloutRequest(str(i), tuple(prompt), params, seed=i))
    engine.scheduler.next(engine.block_size + 1)
    assert len(engine.scheduler.running) == batch
    for sample in engine.scheduler.running:
        assert sample.held is not None
        reserved = engine.cache.reserve(sample.held, sample.anchor + 1)
        assert reserved
        sample.held.length = sample.anchor
    return engine


def _shuffle(cache: PagedCache) -> None:
    """Pages are dealt in random order from here on, as those of an engine that has been running for long."""
    every = cache.open()
    cache.reserve(every, cache.free_pages * cache.page_size)
    np.random.default_rng(0).shuffle(every.pages)
    cache.release(every)


def measure(engine: Engine, rate_B: Sequence[float], warm: int, count: int) -> dict[str, Any]:
    """Median wall-clock of `count` steps after `warm` others, of an engine whose samples go on for longer than that.

    Returns: seconds, fastest, repeats; waited_seconds, the median of what the host waited for the verdict, and
        host_seconds, the rest; passes; tokens_per_step of one sample; tokens_per_s of all, at the median step.
    """
    engine.steps = steps = ForcedSteps(engine, rate_B)
    batch = len(engine.scheduler.running)
    for _ in range(warm):
        engine.step()
    tokens, forwards = engine.decode_tokens, engine.forwards
    seconds, waited = [], []
    for _ in range(count):
        steps.waited, start = 0.0, time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
        waited.append(steps.waited)
    assert len(engine.scheduler.running) == batch and not engine.scheduler.preemptions, "a sample ended or was preempted"
    median, waiting = statistics.median(seconds), statistics.median(waited)
    per_step = (engine.decode_tokens - tokens) / (count * batch)
    return {
        "seconds": median, "fastest": min(seconds), "repeats": count, "waited_seconds": waiting, "host_seconds": median - waiting,
        "passes": (engine.forwards - forwards) // count, "tokens_per_step": per_step,
        "tokens_per_s": batch * per_step / median,
    }  # fmt: skip
