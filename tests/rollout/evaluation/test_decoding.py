"""Figures that follow from the trajectories, and seeds that follow from the task."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from blockroll.errors import InvalidInput
from blockroll.model.layout import causal
from blockroll.model.policy import Policy
from blockroll.model.tasks import make_tasks, score
from blockroll.model.tokenizer import encode_prompt
from blockroll.rollout.evaluation import evaluate, evaluate_ar_loss
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.types import Trajectory


def test_figures_follow_from_the_trajectories(policy: Policy) -> None:
    tasks = make_tasks("heldout", 10)
    made: list[Trajectory] = []
    result = evaluate(
        policy, tasks, sampler="lossless", schedule=Schedule("two_pass"), samples=2, max_tokens=24, batch=4,
        on_finish=made.append,
    )
    assert len(made) == 20
    tokens = sum(len(sample.tokens) for sample in made)
    assert result.answer_tokens == tokens / 20
    assert result.tokens_per_forward == pytest.approx(tokens / sum(sample.forwards for sample in made))
    assert result.tokens_per_step == pytest.approx(tokens / sum(len(sample.trace) for sample in made))
    assert result.tokens_per_forward < result.tokens_per_step <= 2 * result.tokens_per_forward
    assert sum(result.finish_reasons.values()) == 20
    by_id = {task.id: task for task in tasks}
    scores = [
        score(by_id[sample.request_id], policy.tokenizer.decode(sample.tokens, skip_special_tokens=True))
        if sample.finish_reason == "stop" else 0.0
        for sample in made
    ]
    assert result.pass_at_1 == pytest.approx(np.mean(scores))
    assert set(result.families) == {task.family for task in tasks}
    assert result.pass_at == {1: result.pass_at_1}
    assert result.surprise == pytest.approx(-sum(float(sample.logprobs.sum()) for sample in made) / tokens, rel=1e-5)
    assert (result.schedule, result.levels, result.mix_weight, result.block_size) == ("two_pass", (), None, 8)


def test_a_right_answer_counts_when_it_ended(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    # Random weights answer nothing right; a verifier that says yes shows which samples are asked about at all.
    monkeypatch.setattr("blockroll.model.tasks.task_set.score", lambda task, text: 1.0)
    tasks = make_tasks("heldout", 20)
    result = evaluate(policy, tasks, sampler="ar", schedule=Schedule("ar"), max_tokens=100, batch=20)
    assert set(result.finish_reasons) == {"stop", "length"}
    assert result.pass_at_1 == pytest.approx(result.finish_reasons["stop"] / 20)
    share = result.pass_at_1
    assert result.standard_error == pytest.approx((share * (1 - share) / 20) ** 0.5)


def test_pass_at_k_counts_the_right_ones_of_each_task(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    # Right are the samples whose text has an even length, whether or not they ended.
    monkeypatch.setattr("blockroll.model.tasks.task_set.score", lambda task, text: float(len(text) % 2 == 0))
    made: list[Trajectory] = []
    result = evaluate(policy, make_tasks("heldout", 6), sampler="ar", schedule=Schedule("ar"), samples=4, k=(1, 2, 4),
                      max_tokens=60, batch=24, on_finish=made.append)  # fmt: skip
    outcomes: dict[str, list[bool]] = {}
    for sample in made:
        text = policy.tokenizer.decode(sample.tokens, skip_special_tokens=True)
        outcomes.setdefault(sample.request_id, []).append(sample.finish_reason == "stop" and len(text) % 2 == 0)
    assert 0 < sum(map(sum, outcomes.values())) < 24
    for k in (1, 2, 4):
        shares = [np.mean([any(some) for some in combinations(task, k)]) for task in outcomes.values()]
        assert result.pass_at[k] == pytest.approx(np.mean(shares))
        assert result.pass_at_standard_error[k] == pytest.approx(np.std(shares) / 6**0.5)


def test_seeds_follow_the_task(policy: Policy) -> None:
    tasks = make_tasks("heldout", 6)

    def sampled(order: list, **options: object) -> dict[tuple[str, int], list[int]]:
        made: list[Trajectory] = []
        options = {"sampler": "ar", "schedule": Schedule("ar"), "batch": 1} | options
        evaluate(policy, order, max_tokens=16, samples=2, on_finish=made.append, **options)  # type: ignore[arg-type]
        return {sample.key: sample.tokens for sample in made}

    reference = sampled(tasks)
    assert sampled(tasks[::-1], batch=5) == reference
    assert sampled(tasks, sampler="coupled", schedule=Schedule("fused"), batch=3, block_size=4) == reference
    assert sampled(tasks, seed=1) != reference


def test_ar_loss(policy: Policy) -> None:
    tasks = make_tasks("heldout", 5)
    total = count = 0.0
    for task in tasks:
        prompt = encode_prompt(policy.tokenizer, task.prompt)
        tokens = [*policy.tokenizer.encode(task.completion, add_special_tokens=False), policy.tokenizer.eos_token_id]
        logp_TV = policy.head(policy(causal([[*prompt, *tokens]]))).double().log_softmax(-1)
        total -= sum(float(logp_TV[len(prompt) + i - 1, token]) for i, token in enumerate(tokens))
        count += len(tokens)
    assert evaluate_ar_loss(policy, tasks) == pytest.approx(total / count, rel=1e-5)


def test_bad_input(policy: Policy) -> None:
    task = make_tasks("heldout", 1)
    ar = Schedule("ar")
    with pytest.raises(InvalidInput, match="tasks: none are given"):
        evaluate(policy, [], sampler="ar", schedule=ar)
    with pytest.raises(InvalidInput, match="a task is given twice"):
        evaluate(policy, task * 2, sampler="ar", schedule=ar)
    with pytest.raises(InvalidInput, match=r"k: 4 is more than the 2 sample"):
        evaluate(policy, task, sampler="ar", schedule=ar, samples=2, k=(1, 4))
    with pytest.raises(InvalidInput, match="seed: -1 is negative"):
        evaluate(policy, task, sampler="ar", schedule=ar, seed=-1)
    tokenizer, policy.tokenizer = policy.tokenizer, None
    try:
        with pytest.raises(InvalidInput, match="policy: has no tokenizer"):
            evaluate_ar_loss(policy, task)
    finally:
        policy.tokenizer = tokenizer
