"""What a policy is worth: right answers on held-out tasks, tokens per forward, and how far drafts survive.

Invariants:
- Every figure stands with sampler, schedule, block size, batch, temperature, seed and number of tasks.
- A sample that did not end by itself counts as wrong. Its seed depends on (seed, task) alone, so the order of the tasks,
  the batch and the schedule leave what `ar` and `coupled` sample unchanged.
- Nothing is shown or written here.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InvalidInput
from ..model.policy import Policy
from ..model.scoring import score as score_tokens
from ..model.tasks import Task, score
from ..model.tokenizer import encode_prompt
from .engine import Engine, EngineConfig
from .offline import serve
from .schedule import Schedule
from .types import RolloutRequest, SamplerName, SamplingParams, Trajectory

_POSITIONS = 32


@dataclass(frozen=True)
class Evaluation:
    """Figures of one policy under one way to decode.

    Attributes:
        levels: of the schedule `fused`; empty for the others.
        mix_weight: of the sampler `mixed`; None for the others.
        tasks, samples: tasks, and samples of each.
        pass_at_1: mean score over tasks and samples.
        standard_error: of pass_at_1, over tasks; the samples of one task do not count as independent.
        families: pass_at_1 of each family.
        answer_tokens: mean tokens of a sample, the ending one included.
        tokens_per_forward: committed tokens over decode forwards of their own sample; prefill is not counted.
        tokens_per_step: committed tokens over decode steps; a step of `two_pass` is up to two forwards.
        tokens_per_step_by_position: the same by first position of a span of 32 generated tokens, last steps left out.
        acceptance: entry k - 1: of the steps that verified a k-th draft after accepting all before it, the fraction that
            accepted it.
        survival: entry k - 1: of all steps that verified at least k drafts, the fraction that accepted the first k.
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
    families: Mapping[str, float]
    answer_tokens: float
    tokens_per_forward: float
    tokens_per_step: float
    tokens_per_step_by_position: Mapping[str, float]
    acceptance: tuple[float, ...]
    survival: tuple[float, ...]
    tokens_per_s: float
    finish_reasons: Mapping[str, int]


def evaluate(
    policy: Policy,
    tasks: Sequence[Task],
    *,
    sampler: SamplerName,
    schedule: Schedule,
    temperature: float = 1.0,
    mix_weight: float = 0.5,
    samples: int = 1,
    max_tokens: int = 256,
    batch: int = 1,
    seed: int = 0,
    block_size: int | None = None,
    on_finish: Callable[[Trajectory], None] | None = None,
) -> Evaluation:
    """Samples answers to tasks and scores them.

    Args:
        samples: samples per task.
        batch: samples decoded at once.
        seed: >= 0.
        block_size: mask rows of a block; None for the policy's own.
        on_finish: called with each sample as it ends.

    Raises:
        InvalidInput: a policy without a tokenizer, no tasks, or a parameter out of range.
    """
    tokenizer = _tokenizer(policy, tasks)
    params = SamplingParams(
        sampler=sampler, temperature=temperature, mix_weight=mix_weight, max_tokens=max_tokens
    )
    by_id = {task.id: task for task in tasks}
    if len(by_id) != len(tasks):
        raise InvalidInput("tasks", "a task is given twice", "use `samples` to sample a task more than once")
    requests = [
        RolloutRequest(task.id, tuple(encode_prompt(tokenizer, task.prompt)), params, _seed_of(seed, task.id), samples)
        for task in tasks
    ]
    engine = Engine(policy, _engine_config(policy, requests, schedule, batch, block_size))
    scores: dict[str, list[float]] = {task.id: [] for task in tasks}
    made: list[Trajectory] = []
    start = time.perf_counter()
    for sample in serve(engine, requests, 2 * batch):
        made.append(sample)
        if on_finish is not None:
            on_finish(sample)
    seconds = time.perf_counter() - start
    for sample in made:
        text = tokenizer.decode(sample.tokens, skip_special_tokens=True)
        right = score(by_id[sample.request_id], text) if sample.finish_reason == "stop" else 0.0
        scores[sample.request_id].append(right)
    families: dict[str, list[float]] = defaultdict(list)
    for task in tasks:
        families[task.family] += scores[task.id]
    per_task = np.array([np.mean(values) for values in scores.values()])
    tokens = sum(len(sample.tokens) for sample in made)
    acceptance, survival = acceptance_by_slot(made)
    return Evaluation(
        sampler=sampler,
        schedule=schedule.kind,
        levels=schedule.levels if schedule.kind == "fused" else (),
        mix_weight=mix_weight if sampler == "mixed" else None,
        block_size=engine.block_size,
        batch=batch,
        temperature=temperature,
        max_tokens=max_tokens,
        seed=seed,
        tasks=len(tasks),
        samples=samples,
        pass_at_1=float(per_task.mean()),
        standard_error=float(per_task.std() / math.sqrt(len(per_task))),
        families={family: float(np.mean(values)) for family, values in sorted(families.items())},
        answer_tokens=tokens / len(made),
        tokens_per_forward=tokens / sum(sample.forwards for sample in made),
        tokens_per_step=tokens / sum(len(sample.trace) for sample in made),
        tokens_per_step_by_position=_by_position(made),
        acceptance=acceptance,
        survival=survival,
        tokens_per_s=tokens / seconds,
        finish_reasons=dict(sorted(Counter(sample.finish_reason for sample in made).items())),
    )


def evaluate_ar_loss(policy: Policy, tasks: Sequence[Task]) -> float:
    """Nats per token of the tasks' own completions, end of sequence included, by one causal pass.

    Raises:
        InvalidInput: a policy without a tokenizer, no tasks, or a task longer than the policy's maximum.
    """
    tokenizer = _tokenizer(policy, tasks)
    pairs = [
        (
            encode_prompt(tokenizer, task.prompt),
            [*tokenizer.encode(task.completion, add_special_tokens=False), tokenizer.eos_token_id],
        )
        for task in tasks
    ]
    return float(-np.concatenate(score_tokens(policy, pairs)).mean(dtype=np.float64))


def acceptance_by_slot(samples: Sequence[Trajectory]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Conditional acceptance and survival of the k-th draft of a step, k from 1.

    Drafts accepted past the token that ended a sample were never part of it: such a step counts as one that verified,
    and accepted, only the drafts it committed. Both end before the first k that no step reached.
    """
    verified: Counter[int] = Counter()
    reached: Counter[int] = Counter()
    accepted: Counter[int] = Counter()
    for sample in samples:
        last = len(sample.prompt_tokens) + len(sample.tokens) - 1
        for step in sample.trace:
            committed = last - step.anchor
            ended_inside = committed <= step.accepted
            taken = committed if ended_inside else step.accepted
            most = committed if ended_inside else step.drafted
            for k in range(1, most + 1):
                verified[k] += 1
                reached[k] += taken >= k - 1
                accepted[k] += taken >= k
    survival = tuple(accepted[k] / verified[k] for k in range(1, len(verified) + 1))
    acceptance = []
    for k in range(1, len(verified) + 1):
        if not reached[k]:
            break
        acceptance.append(accepted[k] / reached[k])
    return tuple(acceptance), survival


def _by_position(samples: Sequence[Trajectory]) -> dict[str, float]:
    committed: dict[int, list[int]] = defaultdict(list)
    for sample in samples:
        for step in sample.trace[:-1]:  # the last one is cut short by the end
            place = (step.anchor + 1 - len(sample.prompt_tokens)) // _POSITIONS * _POSITIONS
            committed[place].append(step.accepted + 1)
    return {str(place): float(np.mean(counts)) for place, counts in sorted(committed.items())}


def _tokenizer(policy: Policy, tasks: Sequence[Task]):
    if policy.tokenizer is None:
        raise InvalidInput("policy", "has no tokenizer", "tasks are text; save the tokenizer beside the weights")
    if not tasks:
        raise InvalidInput("tasks", "none are given", "give at least one")
    return policy.tokenizer


def _seed_of(seed: int, task_id: str) -> int:
    if seed < 0:
        raise InvalidInput("seed", f"{seed} is negative", "use a number >= 0")
    return int.from_bytes(hashlib.sha256(f"{seed}/{task_id}".encode()).digest()[:8], "big") >> 1


def _engine_config(
    policy: Policy, requests: Sequence[RolloutRequest], schedule: Schedule, batch: int, block_size: int | None
) -> EngineConfig:
    """Pages for as many of the longest samples as run at once, so that none waits for another's."""
    config = EngineConfig(schedule=schedule, max_batch=batch, block_size=block_size)
    longest = max(len(request.prompt_tokens) + request.params.max_tokens for request in requests)
    longest = min(longest, policy.config.max_position_embeddings)
    pages = (batch + 1) * -(-longest // config.page_size)
    return EngineConfig(schedule=schedule, max_batch=batch, block_size=block_size, pages=pages)
