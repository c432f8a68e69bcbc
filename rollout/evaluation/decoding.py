"""One way to decode held-out tasks: right answers, tokens per forward, and how far drafts survive.

Invariants:
- Every figure stands with sampler, schedule, block size, batch, temperature, seed and number of tasks.
- A sample that did not end by itself counts as wrong. Its seed depends on (seed, task) alone, so the order of the tasks,
  the batch and the schedule leave what `ar` and `coupled` sample unchanged.
- Nothing is shown or written here.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...errors import InvalidInput
from ...model.policy import Policy
from ...model.scoring import score as score_tokens
from ...model.tasks.task_set import AnyTask, ReasoningGym, TaskSet, answer_of
from ...seeds import derived_seed
from ..engine import Engine, EngineConfig
from ..offline import pool_size, serve
from ..schedule import Schedule
from ..search.estimators import pass_at_k
from ..types import RolloutRequest, SamplerName, SamplingParams, Trajectory
from .counts import (
    Kind,
    acceptance_by_kind,
    acceptance_by_slot,
    by_task,
    kinds_of,
    mean,
    ratio,
    tokens_per_step_by_position,
)  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """Figures of one policy under one way to decode. Standard errors are over tasks.

    Attributes:
        levels: of the schedule `fused`; empty for the others.
        mix_weight: of the sampler `mixed`; None for the others.
        tasks, samples: tasks, and samples of each.
        pass_at_1: share of right samples, over tasks and samples; a sample is right from the reward `right` on.
        standard_error: of pass_at_1.
        reward, reward_standard_error: mean reward. A sample without one counts as 0.
        unrewarded: samples without a reward.
        pass_at, pass_at_standard_error: by k, the chance that one of k samples is right.
        families: pass_at_1 of each family.
        answer_tokens, answer_tokens_standard_error: mean tokens of a sample, the ending one included.
        surprise, surprise_standard_error: nats per token of the samples under p at the temperature (0: at 1). Of a sampler
            that draws from p this is the entropy of p per token.
        tokens_per_forward: committed tokens over decode forwards of their own sample; prefill is not counted.
        tokens_per_step: committed tokens over decode steps; a step of `two_pass` is up to two forwards.
        tokens_per_step_by_position: the same by first position of a span of 32 generated tokens, last steps left out.
        acceptance: entry k - 1: of the steps that verified a k-th draft after accepting all before it, the fraction that
            accepted it.
        survival: entry k - 1: of all steps that verified at least k drafts, the fraction that accepted the first k.
        acceptance_by_kind: by kind of token, as `counts.acceptance_by_kind`.
        tokens_per_s: committed tokens over wall time, prefill included.
        finish_reasons: samples per finish reason.
    """

    sampler: SamplerName
    schedule: str
    levels: tuple[int, ...]
    mix_weight: float | None
    block_size: int
    batch: int
    temperature: float
    max_tokens: int
    seed: int
    tasks: int
    samples: int
    pass_at_1: float
    standard_error: float
    reward: float
    reward_standard_error: float
    unrewarded: int
    pass_at: Mapping[int, float]
    pass_at_standard_error: Mapping[int, float]
    families: Mapping[str, float]
    answer_tokens: float
    answer_tokens_standard_error: float
    surprise: float
    surprise_standard_error: float
    tokens_per_forward: float
    tokens_per_forward_standard_error: float
    tokens_per_step: float
    tokens_per_step_by_position: Mapping[str, float]
    acceptance: tuple[float, ...]
    survival: tuple[float, ...]
    acceptance_by_kind: Mapping[Kind, Mapping[str, float | None]]
    tokens_per_s: float
    finish_reasons: Mapping[str, int]


def evaluate(
    policy: Policy,
    tasks: Sequence[AnyTask],
    *,
    source: TaskSet | None = None,
    right: float = 1.0,
    sampler: SamplerName,
    schedule: Schedule,
    temperature: float = 1.0,
    mix_weight: float = 0.5,
    samples: int = 1,
    k: Sequence[int] = (1,),
    max_tokens: int = 256,
    batch: int = 1,
    seed: int = 0,
    block_size: int | None = None,
    draft_temperature: float | None = None,
    on_finish: Callable[[Trajectory], None] | None = None,
) -> Evaluation:
    """Samples answers to tasks and scores them.

    Args:
        source: what the tasks came from; reasoning-gym by default.
        right: reward from which a sample is right.
        samples: samples per task.
        k: sizes of the groups of samples that `pass_at` speaks of, at most `samples`.
        batch: samples decoded at once.
        seed: >= 0.
        block_size: mask rows of a block; None for the policy's own.
        draft_temperature: as in `EngineConfig`.
        on_finish: called with each sample as it ends.

    Raises:
        InvalidInput: a policy without a tokenizer, no tasks, or a parameter out of range.
    """
    tokenizer, source = tokenizer_of(policy, tasks), source or ReasoningGym()
    check_groups(k, samples)
    if seed < 0:
        raise InvalidInput("seed", f"{seed} is negative", "use a number >= 0")
    params = SamplingParams(sampler=sampler, temperature=temperature, mix_weight=mix_weight, max_tokens=max_tokens)
    by_id = {task.id: task for task in tasks}
    if len(by_id) != len(tasks):
        raise InvalidInput("tasks", "a task is given twice", "use `samples` to sample a task more than once")
    requests = [
        RolloutRequest(task.id, source.prompt_tokens(task, tokenizer), params, derived_seed(seed, task.id), samples)
        for task in tasks
    ]
    config = EngineConfig(schedule=schedule, max_batch=batch, block_size=block_size, draft_temperature=draft_temperature)
    longest = max(len(request.prompt_tokens) for request in requests) + max_tokens
    engine = Engine(policy, replace(config, pages=pool_size(longest, policy, config)))
    scores: dict[str, list[float]] = {task.id: [] for task in tasks}
    made: list[Trajectory] = []
    start = time.perf_counter()
    for sample in serve(engine, requests, 2 * batch):
        made.append(sample)
        if on_finish is not None:
            on_finish(sample)
    seconds = time.perf_counter() - start
    found = source.score([(by_id[s.request_id], answer_of(tokenizer, s.tokens, s.finish_reason)) for s in made])
    rewards: dict[str, list[float]] = {task.id: [] for task in tasks}
    for sample, reward in zip(made, found, strict=True):
        rewards[sample.request_id].append(reward or 0.0)
        scores[sample.request_id].append(float(reward is not None and reward >= right))
    families: dict[str, list[float]] = defaultdict(list)
    for task in tasks:
        families[task.family] += scores[task.id]
    pass_at = {n: mean([pass_at_k(samples, int(sum(values)), n) for values in scores.values()]) for n in k}
    pass_at_1, standard_error = mean([float(np.mean(values)) for values in scores.values()])
    mean_reward = mean([float(np.mean(values)) for values in rewards.values()])
    tokens_per_task = by_task(made, lambda sample: len(sample.tokens))
    answer_tokens = ratio(tokens_per_task, [samples] * len(tasks))
    surprise = ratio(by_task(made, lambda sample: -float(sample.logprobs.sum(dtype=np.float64))), tokens_per_task)
    tokens_per_forward = ratio(tokens_per_task, by_task(made, lambda sample: sample.forwards))
    tokens = sum(tokens_per_task)
    acceptance, survival = acceptance_by_slot(made)
    return Evaluation(
        sampler=sampler,
        schedule=schedule.kind,
        levels=tuple(level for level in schedule.levels if level < engine.block_size) if schedule.kind == "fused" else (),
        mix_weight=mix_weight if sampler == "mixed" else None,
        block_size=engine.block_size,
        batch=batch,
        temperature=temperature,
        max_tokens=max_tokens,
        seed=seed,
        tasks=len(tasks),
        samples=samples,
        pass_at_1=pass_at_1,
        standard_error=standard_error,
        reward=mean_reward[0],
        reward_standard_error=mean_reward[1],
        unrewarded=sum(reward is None for reward in found),
        pass_at={n: value for n, (value, _) in pass_at.items()},
        pass_at_standard_error={n: error for n, (_, error) in pass_at.items()},
        families={family: float(np.mean(values)) for family, values in sorted(families.items())},
        answer_tokens=answer_tokens[0],
        answer_tokens_standard_error=answer_tokens[1],
        surprise=surprise[0],
        surprise_standard_error=surprise[1],
        tokens_per_forward=tokens_per_forward[0],
        tokens_per_forward_standard_error=tokens_per_forward[1],
        tokens_per_step=tokens / sum(len(sample.trace) for sample in made),
        tokens_per_step_by_position=tokens_per_step_by_position(made),
        acceptance=acceptance,
        survival=survival,
        acceptance_by_kind=acceptance_by_kind(made, kinds_of(tokenizer, policy.eos_token_ids)),
        tokens_per_s=tokens / seconds,
        finish_reasons=dict(sorted(Counter(sample.finish_reason for sample in made).items())),
    )


def evaluate_ar_loss(policy: Policy, tasks: Sequence[AnyTask]) -> float:
    """Nats per token of the tasks' own completions, end of sequence included, by one causal pass.

    Raises:
        InvalidInput: a policy without a tokenizer, no tasks, or a task longer than the policy's maximum.
    """
    return ar_loss(policy, tasks)[0]


def ar_loss(policy: Policy, tasks: Sequence[AnyTask], source: TaskSet | None = None) -> tuple[float, float]:
    """`evaluate_ar_loss`, and its standard error over tasks."""
    tokenizer, source = tokenizer_of(policy, tasks), source or ReasoningGym()
    pairs = [
        (
            source.prompt_tokens(task, tokenizer),
            [*tokenizer.encode(task.completion or "", add_special_tokens=False), tokenizer.eos_token_id],
        )
        for task in tasks
    ]
    scored = score_tokens(policy, pairs)
    return ratio([-float(logprobs.sum(dtype=np.float64)) for logprobs in scored], [len(logprobs) for logprobs in scored])


def tokenizer_of(policy: Policy, tasks: Sequence[AnyTask]):
    """The policy's tokenizer; InvalidInput where it has none, or there are no tasks."""
    if policy.tokenizer is None:
        raise InvalidInput("policy", "has no tokenizer", "tasks are text; save the tokenizer beside the weights")
    if not tasks:
        raise InvalidInput("tasks", "none are given", "give at least one")
    return policy.tokenizer


def check_groups(k: Sequence[int], samples: int) -> None:
    """Raises InvalidInput if a k is larger than the number of samples of a task."""
    if not k or min(k) < 1:
        raise InvalidInput("k", f"{list(k)} holds no whole number, or one less than 1", "write numbers like 1,2,4")
    if max(k) > samples:
        raise InvalidInput("k", f"{max(k)} is more than the {samples} sample(s) of a task", "lower it, or raise `samples`")
