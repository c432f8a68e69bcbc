"""The samplers' rows of batch after batch are those that are made anew."""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import torch

from blockroll.rollout.sampling.adjustment import Prefix
from blockroll.rollout.sampling.drafts import SamplerRows
from blockroll.rollout.sequence import Sample
from blockroll.rollout.steps.sampler_rows import SamplerRowsCache
from blockroll.rollout.types import RolloutRequest, SamplingParams

SHARED = SamplingParams(temperature=0.7)
KINDS = (
    SHARED, replace(SHARED), SamplingParams("ar"), SamplingParams(temperature=0.0), SamplingParams(top_p=0.5, logprobs=3),
    SamplingParams(repetition_penalty=1.5, min_tokens=2), SamplingParams("mixed", mix_weight=0.25), SHARED, SHARED,
)  # fmt: skip


def sample(number: int, params: SamplingParams) -> Sample:
    return Sample(RolloutRequest(f"r{number}", (5, 6, 7), params, seed=number), 0, 20, [5, 6, 7], frozenset(), number)


def numbers(rows: SamplerRows) -> list[object]:
    found = [getattr(rows, name) for name in SamplerRows.__slots__ if name != "groups"]
    groups = [(g.sampler, g.greedy, g.cut, g.index_G, g.adjustment is not None) for g in rows.groups]
    parts = [*found, *(part for group in groups for part in group)]
    return [each.tolist() if isinstance(each, torch.Tensor) else each for each in parts]


def test_rows_of_changing_batches_are_those_of_the_batch():
    random, cache, alike = np.random.default_rng(0), SamplerRowsCache(torch.device("cpu"), 0.7), 0
    running = [sample(i, SHARED) for i in range(5)]
    for step in range(300):
        kinds = KINDS if step % 50 > 25 else (SHARED, KINDS[1])
        if random.random() < 0.7:
            running[random.integers(len(running))] = sample(100 + step, kinds[random.integers(len(kinds))])
        elif random.random() < 0.5 and len(running) > 2:
            running.pop(random.integers(len(running)))
        else:
            running.append(sample(1000 + step, kinds[random.integers(len(kinds))]))
        rows = cache.rows(list(running))
        assert rows is cache.rows(list(running))
        params, prefixes = [s.request.params for s in running], [Prefix(s.tokens, 3, s.stops) for s in running]
        anew = SamplerRows.make(params, [s.seed for s in running], prefixes=prefixes, draft_temperature=0.7)
        assert numbers(rows) == numbers(anew), step
        alike += rows.temperature_S is cache._known.get(len(running), (None, anew))[1].temperature_S
    assert alike > 100  # most batches take the parameters of one before


def test_a_sample_that_adjusts_logits_is_never_mixed_up_with_an_earlier_one():
    """What adjusts logits knows the tokens of its own sample."""
    cache, params = SamplerRowsCache(torch.device("cpu"), 1.0), KINDS[5]
    before = cache.rows([sample(1, params)]).groups[0].adjustment
    assert before is not None and cache.rows([sample(2, params)]).groups[0].adjustment is not before


def test_forgotten_samples_are_gone():
    cache, ended = SamplerRowsCache(torch.device("cpu"), 1.0), sample(1, SHARED)

    def held() -> bool:
        return any(isinstance(each, list) for each in gc.get_referrers(ended))

    cache.rows([ended])
    assert held()
    cache.forget_samples()
    assert not held()
