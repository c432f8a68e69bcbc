"""Log-probabilities of the engine are those of `score` in every bit, over thousands of samples decoded every way."""

from __future__ import annotations

import random

import numpy as np
import pytest

from blockroll.model.backends import products
from blockroll.model.checkpoint import load_policy
from blockroll.model.scoring import score
from blockroll.model.tasks import make_tasks
from blockroll.model.tokenizer import encode_prompt
from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.types import RolloutRequest, SamplingParams

SAMPLERS = ("ar", "lossless", "coupled", "mixed")
ENGINES = [
    EngineConfig(Schedule("fused", levels=(0, 4, 8)), max_batch=32),
    EngineConfig(Schedule("two_pass"), max_batch=7, prefill_rows=5),
    EngineConfig(Schedule("fused", drafts=3, levels=(0, 1)), max_batch=3, prefill_rows=33),
    EngineConfig(Schedule("fused"), max_batch=32, pages=70, page_size=8),
    EngineConfig(Schedule("auto"), max_batch=1),
]
"""Of which the fourth preempts."""


def compare(count: int) -> tuple[int, int]:
    """Decodes `count` samples of mixed samplers, prompt lengths, lengths and cut-offs in every engine of `ENGINES` in turn, and
    scores each alone and all among one another, in another order. Returns samples and preemptions."""
    policy = load_policy("tiny-reasoner")
    assert products(policy).startswith("fixed order")
    draw = random.Random(0)
    tasks = [
        (encode_prompt(policy.tokenizer, task.prompt), policy.tokenizer.encode(task.completion, add_special_tokens=False))
        for task in make_tasks("heldout", 256)
    ]
    cuts = [{}, {}, {"top_p": 0.8}, {"top_k": 5}, {"top_k": 9, "top_p": 0.9, "min_p": 0.02}]
    seen = preempted = 0
    for number, config in enumerate(ENGINES):
        asked = []
        for i in range(count // len(ENGINES) // 2):  # two samples of each prompt
            prompt, answer = draw.choice(tasks)
            prompt = [*prompt, *answer[: draw.choice((0, 0, 3, 20, 60))]][draw.randrange(len(prompt)):]
            params = SamplingParams(SAMPLERS[i % 4], 1.0, max_tokens=draw.choice((1, 2, 9, 40, 90)), **draw.choice(cuts))
            asked.append(RolloutRequest(f"r{i}", tuple(prompt), params, 1000 * number + i, 2))
        engine = Engine(policy, config)
        samples = engine.rollout(asked)
        preempted += engine.scheduler.preemptions
        seen += len(samples)
        order = draw.sample(range(len(samples)), len(samples))
        pairs = [(samples[i].prompt_tokens, samples[i].tokens) for i in order]
        for i, pair, among in zip(order, pairs, score(policy, pairs), strict=True):
            assert np.array_equal(samples[i].logprobs, among), (number, samples[i].request_id)
            assert np.array_equal(score(policy, [pair])[0], among), (number, samples[i].request_id)
    return seen, preempted


def test_every_bit_of_some_samples():
    assert compare(80)[0] == 80


@pytest.mark.slow
def test_every_bit_of_two_thousand_samples():
    samples, preemptions = compare(2000)
    assert samples == 2000 and preemptions > 100, preemptions
