"""Evaluation: figures that follow from the trajectories, and seeds that follow from the task."""

from __future__ import annotations

import numpy as np
import pytest

from blockroll.errors import InvalidInput
from blockroll.model.conversion.config import Architecture, ConversionConfig, Stage
from blockroll.model.conversion.train import new_policy
from blockroll.model.layout import causal
from blockroll.model.policy import Policy
from blockroll.model.tasks import make_tasks, score
from blockroll.model.tokenizer import encode_prompt
from blockroll.rollout.evaluation import acceptance_by_slot, evaluate, evaluate_ar_loss
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.types import StepTrace, Trajectory

SMALL = Architecture(
    hidden_size=32, layers=2, heads=2, kv_heads=1, head_dim=16, experts=2, expert_size=32, router_size=8,
    max_position_embeddings=256,
)


@pytest.fixture(scope="module")
def policy() -> Policy:
    """Random weights with a tokenizer: writes nonsense, rarely ends by itself."""
    config = ConversionConfig(
        output="unused", architecture=SMALL, block_size=8, stages=(Stage(name="ar", kind="ar", tokens=1),)
    )
    return new_policy(config).requires_grad_(False).eval()


def trajectory(trace: tuple[StepTrace, ...], prompt: int, tokens: int) -> Trajectory:
    zeros = np.zeros(tokens, dtype=np.float32)
    return Trajectory(
        "a", 0, tuple(range(prompt)), [1] * tokens, zeros, zeros, zeros.astype(np.int32), zeros.astype(bool), "stop",
        len(trace), trace,
    )


def test_acceptance_by_slot() -> None:
    # Prompt of 3, so the first anchor is at 2. Steps commit 3, 1, then 2 of the 4 that were accepted: the second ends it.
    trace = (StepTrace(2, 3, 2, 3, 4, 1), StepTrace(5, 2, 0, 5, 4, 1), StepTrace(6, 4, 4, 7, 4, 1))
    acceptance, survival = acceptance_by_slot([trajectory(trace, prompt=3, tokens=6)])
    assert survival == pytest.approx((2 / 3, 2 / 3, 0.0))
    assert acceptance == pytest.approx((2 / 3, 1.0, 0.0))


def test_acceptance_counts_a_rejection_before_the_end() -> None:
    # One draft accepted of four, and the token that replaced the second one ended the sample.
    trace = (StepTrace(0, 4, 1, 1, 4, 1),)
    acceptance, survival = acceptance_by_slot([trajectory(trace, prompt=1, tokens=2)])
    assert (acceptance, survival) == ((1.0, 0.0), (1.0, 0.0, 0.0, 0.0))


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
    assert (result.schedule, result.levels, result.mix_weight, result.block_size) == ("two_pass", (), None, 8)


def test_a_right_answer_counts_when_it_ended(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    # Random weights answer nothing right; a verifier that says yes shows which samples are asked about at all.
    monkeypatch.setattr("blockroll.rollout.evaluation.decoding.score", lambda task, text: 1.0)
    tasks = make_tasks("heldout", 20)
    result = evaluate(policy, tasks, sampler="ar", schedule=Schedule("ar"), max_tokens=100, batch=20)
    assert set(result.finish_reasons) == {"stop", "length"}
    assert result.pass_at_1 == pytest.approx(result.finish_reasons["stop"] / 20)
    share = result.pass_at_1
    assert result.standard_error == pytest.approx((share * (1 - share) / 20) ** 0.5)


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
    with pytest.raises(InvalidInput, match="seed: -1 is negative"):
        evaluate(policy, task, sampler="ar", schedule=ar, seed=-1)
    tokenizer, policy.tokenizer = policy.tokenizer, None
    try:
        with pytest.raises(InvalidInput, match="policy: has no tokenizer"):
            evaluate_ar_loss(policy, task)
    finally:
        policy.tokenizer = tokenizer
