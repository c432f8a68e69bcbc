"""An engine in the middle of its work, whose acceptance is forced, and what its steps take by the clock.

Invariants:
- The steps are the engine's own, whole: scheduling, plans, forward passes, verification, commit, drafts. The cache holds random
  numbers, and the samples stand at the end of their prompts as if these had been prefilled. No two samples share a page.
- Verification runs and is timed. Only then is the number of accepted drafts replaced: random weights accept hardly any. The host
  draws and uploads the numbers, which costs it a little more than a step of a trained policy; it never waits for the device.

Legend: D samples, R = M + 1 verify rows, M most drafts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ....errors import InvalidInput
from ....kernels.transfer import PinnedCopy
from ....model.policy import Policy
from ...cache import PagedCache, pages_for
from ...engine import Engine, EngineConfig
from ...params import SamplerName
from ...placed import placed
from ...sampling.drafts import Drafts, SamplerRows, Verdict
from ...sampling.sampler import verify
from ...schedule import Schedule
from ...steps.plan import StepPlan
from ...steps.recurring import bucket
from ...types import RolloutRequest, SamplingParams
from .parts import fill


class ForcedAcceptance:
    """A verifier that replaces the number of accepted drafts. The draft in slot j of its block is accepted with probability
    `rate_B[j]` if the drafts before it were; slots past the end of `rate_B` have its last rate.

    Args:
        samples: most of a step, padding included.
    """

    def __init__(self, device: torch.device, samples: int, rate_B: Sequence[float] = (1.0,), seed: int = 0) -> None:
        self._accepted_S = torch.zeros(samples, dtype=torch.int64)
        self._copy = PinnedCopy(self._accepted_S, device, [self._accepted_S])
        self._draw = np.random.default_rng(seed)
        self.rate_B = np.array(rate_B, dtype=np.float64)

    def prepare(self, plan: StepPlan) -> None:
        """Draw this step's numbers and send them."""
        self._accepted_S.numpy()[: len(plan.count_D)] = self._accepted(plan, int(plan.count_D.max()))
        self._copy.send()

    def __call__(self, sampling: SamplerRows, p_logits_SRV: torch.Tensor, drafts: Drafts, anchor_S: torch.Tensor) -> Verdict:
        """The samplers' verdict, with another number of accepted drafts."""
        verdict = verify(sampling, p_logits_SRV, drafts, anchor_S)
        if not drafts.token_SM.shape[1]:
            return verdict
        # Rows of drafts that were rejected hold no token.
        accepted_S = self._copy.tree[: len(anchor_S)]
        return replace(verdict, accepted_S=accepted_S, token_SR=verdict.token_SR.clamp_min(0))

    def _accepted(self, plan: StepPlan, most: int) -> np.ndarray:
        """Forced counts. One number per sample decides, drawn from as many strata as there are samples: each count has its
        own distribution, and their mean varies less than that of independent ones."""
        count_D1 = plan.count_D[:, None]
        slot_D1 = (np.array(plan.forward.start_D) + 1 - np.array(plan.block_start_D))[:, None]
        line, last = np.arange(most), len(self.rate_B) - 1
        rate_DM = np.where(line < count_D1, self.rate_B[np.minimum(slot_D1 + line, last)], 0.0)
        samples = len(count_D1)
        u_D = (self._draw.permutation(samples) + self._draw.random(samples)) / samples
        return (u_D[:, None] < rate_DM.cumprod(1)).sum(1)


def engine_for(
    policy: Policy, schedule: Schedule, batch: int, context: int, tokens: int, page_size: int, captured: bool = True,
    sampler: SamplerName | None = None,
) -> Engine:  # fmt: skip
    """An engine about to decode `batch` samples of `context` tokens each, which can take `tokens` more.

    Args:
        schedule: with sizes; `ar` decodes with the sampler of that name, the others with `lossless`.
        sampler: another one, whose own verdicts count; None: acceptance is forced.
    Raises:
        InvalidInput: the policy's positions end before that.
    """
    most = policy.config.max_position_embeddings
    if context + tokens > most:
        raise InvalidInput("context", f"{context} and {tokens} tokens are more than the policy's {most}", "give it more")
    pages = batch * pages_for(context + tokens, page_size)
    config = EngineConfig(schedule, max_batch=batch, pages=pages, page_size=page_size, captured=captured, capture_batches=())
    engine = Engine(policy, config)
    if sampler is None:  # steps are captured with the verifier that is there
        engine.runner.verifier = ForcedAcceptance(policy.device, bucket(batch))
    with placed(engine):
        engine.runner.capture([schedule], [batch], pages_for(context + tokens, page_size))
    fill(engine.cache)
    _shuffle(engine.cache)
    draw = torch.Generator().manual_seed(0)
    sampler = sampler or ("ar" if schedule.kind == "ar" else "lossless")
    params = SamplingParams(sampler, max_tokens=tokens, ignore_eos=True)
    for i, prompt in enumerate(torch.randint(policy.mask_token_id, (batch, context), generator=draw).tolist()):
        engine.add(RolloutRequest(str(i), tuple(prompt), params, seed=i))
    engine.scheduler.next(engine.block_size + 1)
    assert len(engine.scheduler.running) == batch
    for sample in engine.scheduler.running:
        assert sample.block_table is not None
        reserved = engine.cache.reserve(sample.block_table, sample.anchor + 1)
        assert reserved
        sample.block_table.length = sample.anchor
    return engine


def _shuffle(cache: PagedCache) -> None:
    """Pages are dealt in random order from here on, as those of an engine that has been running for long."""
    every = cache.open()
    cache.reserve(every, cache.free_pages * cache.page_size)
    np.random.default_rng(0).shuffle(every.pages)
    cache.release(every)


def measure(
    engine: Engine, rate_B: Sequence[float], warm: int, count: int, now: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Median seconds of `count` steps after `warm` others, of an engine whose samples go on for longer than that, by the clock
    `now`: the wall's, unless nothing is waited for.

    Returns: seconds, fastest, repeats; waited_seconds, the median of what the host waited for the verdict, and
        host_seconds, the rest; passes; tokens_per_step of one sample; tokens_per_s of all, at the median step.
    """
    runner = engine.runner
    assert isinstance(runner.verifier, ForcedAcceptance)
    runner.verifier.rate_B = np.array(rate_B, dtype=np.float64)
    batch = len(engine.scheduler.running)
    for _ in range(warm):
        engine.step()
    tokens, forwards = engine.decode_tokens, engine.forwards
    seconds, waited = [], []
    for _ in range(count):
        waited_before, start = runner.wait_seconds, now()
        engine.step()
        seconds.append(now() - start)
        waited.append(runner.wait_seconds - waited_before)
    assert len(engine.scheduler.running) == batch and not engine.scheduler.preemptions, "a sample ended or was preempted"
    median, waiting = statistics.median(seconds), statistics.median(waited)
    per_step = (engine.decode_tokens - tokens) / (count * batch)
    return {
        "seconds": median, "fastest": min(seconds), "repeats": count, "waited_seconds": waiting, "host_seconds": median - waiting,
        "passes": (engine.forwards - forwards) // count, "tokens_per_step": per_step,
        "tokens_per_s": batch * per_step / median,
    }  # fmt: skip
