"""Whole runs of an engine on this device: captured against eager, bit for bit, and the replay oracle.

The oracle drafts the known continuation: first `ar` decodes it, then `coupled`, which gives the tokens of `ar`, verifies it as
its drafts. What that engine commits per second is the engine's ceiling; the share that a trained policy reaches is the drafts'.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch

from ....kernels.dispatch import using
from ....model.policy import Policy
from ...engine import Engine, EngineConfig
from ...params import SamplerName
from ...placed import placed
from ...schedule import Schedule
from ...types import RolloutRequest, SamplingParams
from .parts import random_policy
from .running import engine_for
from .sizes import Sizes

_SAMPLERS: tuple[tuple[SamplerName, float], ...] = (
    ("ar", 1.0), ("coupled", 1.0), ("lossless", 1.0), ("mixed", 0.8), ("lossless", 0.0),
)  # fmt: skip
"""And their temperatures."""


def captured_and_eager(sizes: Sizes, device: torch.device, few_layers: Sizes) -> dict[str, Any]:
    """Samples of unequal lengths to their ends, once with graphs and once without, under `batch_invariant`: the same tokens, and
    log-probabilities of the same bits. `ok` says so, for every sampler."""
    policy = random_policy(few_layers.zaya, sizes.dtype, device)
    away = device.type == "cuda"
    many, length, samplers = (6, 40, _SAMPLERS) if away else (2, 3, _SAMPLERS[2:3])
    equal, graphs = {}, 0
    for sampler, temperature in samplers:
        schedule, made = Schedule("ar") if sampler == "ar" else Schedule("fused", levels=(0, 2)), []
        for captured in (True, False):
            with using(batch_invariant=True):
                config = EngineConfig(schedule, max_batch=many, page_size=sizes.page_size, pages=many * 8, captured=captured,
                                      batch_invariant=True)  # fmt: skip
                engine = Engine(policy, config)
                graphs += engine.runner.model.shapes.budget.graphs
                params = [
                    SamplingParams(sampler, temperature=temperature, max_tokens=length - i, ignore_eos=True) for i in range(many)
                ]
                requests = [RolloutRequest(str(i), (5 + i, 7, 9), params[i], seed=i) for i in range(many)]
                made.append([
                    (list(s.tokens), np.asarray(s.logprobs).tobytes(), np.asarray(s.behavior_logprobs).tobytes())
                    for s in engine.rollout(requests)
                ])  # fmt: skip
        equal[f"{sampler} at {temperature}"] = made[0] == made[1]
    return {"ok": all(equal.values()) and (graphs > 0 or not away), "bits_equal": equal, "graphs": graphs, "samples": many}


def replay_oracle(policy: Policy, schedule: Schedule, batch: int, context: int, page_size: int, count: int) -> dict[str, Any]:
    """Decode steps whose drafts are the tokens that `ar` has drawn for the same samples.

    Args:
        schedule: `fused`, with sizes. count: steps that are timed.

    Returns: seconds of a step and of an AR step, tokens per step and per second, and `diverged`: samples whose tokens left those
        of `ar` (another batch of rows rounds otherwise), whose drafts then are no longer accepted.
    """
    assert schedule.drafts is not None
    warm, tokens = 2, (2 + count) * (schedule.drafts + 1) + 2 * (schedule.drafts + 2)
    known, ar_seconds = _continuations(policy, batch, context, tokens, page_size)
    torch.manual_seed(0)
    engine = engine_for(policy, schedule, batch, context, tokens, page_size, sampler="coupled")
    seconds, before = [], 0
    for step in range(warm + count):
        if step == warm:
            before = engine.decode_tokens
        _replace_drafts(engine, known)
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
    per_step = (engine.decode_tokens - before) / (count * batch)
    median = statistics.median(seconds[warm:])
    diverged = sum(
        sample.tokens[context:] != known[sample.request.id][: len(sample.tokens) - context] for sample in engine.scheduler.running
    )
    return {
        "seconds": median, "ar_seconds": ar_seconds, "tokens_per_step": per_step, "tokens_per_s": batch * per_step / median,
        "ratio_to_ar": per_step * ar_seconds / median, "diverged": diverged, "samples": batch,
    }  # fmt: skip


def _continuations(
    policy: Policy, batch: int, context: int, tokens: int, page_size: int
) -> tuple[dict[str, list[int]], float]:
    """Tokens of `ar` after each prompt, by request, and the median seconds of its steps."""
    torch.manual_seed(0)
    engine = engine_for(policy, Schedule("ar").within(policy.block_size), batch, context, tokens, page_size, sampler="ar")
    seconds = []
    for _ in range(tokens - 2):
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
    return {s.request.id: s.tokens[context:] for s in engine.scheduler.running}, statistics.median(seconds)


def _replace_drafts(engine: Engine, known: dict[str, list[int]]) -> None:
    """Put the known tokens in place of the drafts that wait."""
    samples = [sample for sample in engine.scheduler.running if sample.drafts is not None]
    if not samples:
        return
    drafts = samples[0].drafts
    assert drafts is not None and all(sample.drafts is drafts for sample in samples)
    token_DM = np.full(tuple(drafts.token_SM.shape), -1, dtype=np.int64)
    for sample in samples:
        made = len(sample.tokens) - len(sample.request.prompt_tokens)
        ahead = known[sample.request.id][made : made + sample.draft_count]
        token_DM[sample.draft_index, : len(ahead)] = ahead
    with placed(engine):
        engine.runner.replace_drafts(drafts, torch.from_numpy(token_DM))
