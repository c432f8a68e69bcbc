"""What a policy is worth: right answers on held-out tasks, and tokens per forward.

Invariants:
- Every figure stands with sampler, schedule, batch, temperature and number of tasks.
- A sample that did not end by itself counts as wrong. Seeds depend on the task alone.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InvalidInput
from ..files import write_json
from ..model.checkpoint import load_policy
from ..model.conversion.config import ConversionConfig
from ..model.conversion.train import run as run_stages
from ..model.policy import Policy
from ..model.tasks import Task, make_tasks, score
from ..model.tokenizer import encode_prompt
from ..settings import load_yaml
from .engine import Engine, EngineConfig
from .offline import serve
from .progress import Meter, TrainingMeter
from .schedule import Schedule
from .types import RolloutRequest, SamplingParams, Trajectory

_POSITIONS = 32


def convert(config_path: str | os.PathLike[str]) -> Path:
    """Runs the conversion that a file describes, then measures the policy and its autoregressive parent.

    Writes the policy directory `output` and, beside it, `OUTPUT.figures.json`. Returns the policy directory.

    Raises:
        ConfigError: the file is not a conversion's.
        StorageError: something could not be written whole.
    """
    config = load_yaml(config_path, ConversionConfig)
    output = Path(config.output)
    with TrainingMeter() as report:
        run_stages(config, report)
    if config.evaluation_tasks:
        policy = load_policy(output)  # as it was rounded for the disk
        tasks = make_tasks("heldout", config.evaluation_tasks, config.seed, config.data.families or None)
        ar, fused = Schedule("ar"), Schedule("fused", levels=(0, 4, 8))
        rows = [
            {"policy": "converted"} | evaluate(policy, tasks, "ar", ar, batch=16),
            {"policy": "converted"} | evaluate(policy, tasks, "lossless", fused, batch=1),
        ]
        parent = _parent(config)
        if parent is not None:
            rows.insert(0, {"policy": "parent"} | evaluate(load_policy(parent), tasks, "ar", ar, batch=16))
        write_json(output.with_name(output.name + ".figures.json"), rows)
    return output


def evaluate(
    policy: Policy, tasks: Sequence[Task], sampler: str, schedule: Schedule, *, batch: int, temperature: float = 1.0,
    max_tokens: int = 256,
) -> dict[str, Any]:
    """One sample per task.

    Returns:
        `pass_at_1` with its `standard_error`, in all and per family; `tokens_per_forward` (prefill not counted);
        `tokens_per_step_by_position`: committed tokens per decode step, by the first position of a span of 32
        generated tokens; and what they were measured with.
    """
    if policy.tokenizer is None:
        raise InvalidInput("policy", "has no tokenizer", "tasks are text; save the tokenizer beside the weights")
    params = SamplingParams(sampler=sampler, temperature=temperature, max_tokens=max_tokens)  # type: ignore[arg-type]
    by_id = {task.id: task for task in tasks}
    requests = [
        RolloutRequest(task.id, tuple(encode_prompt(policy.tokenizer, task.prompt)), params, seed=number)
        for number, task in enumerate(tasks)
    ]
    engine = Engine(policy, EngineConfig(schedule=schedule, max_batch=batch))
    right: dict[str, list[float]] = defaultdict(list)
    samples: list[Trajectory] = []
    with Meter(f"held-out tasks, {sampler}", len(requests)) as meter:
        for sample in serve(engine, requests, 2 * batch):
            text = policy.tokenizer.decode(sample.tokens, skip_special_tokens=True)
            task = by_id[sample.request_id]
            right[task.family].append(score(task, text) if sample.finish_reason == "stop" else 0.0)
            samples.append(sample)
            meter.advance(len(sample.tokens), sample.forwards)
    answers = np.concatenate([np.array(values) for values in right.values()])
    return {
        "sampler": sampler,
        "schedule": schedule.kind,
        "levels": list(schedule.levels) if schedule.kind == "fused" else [],
        "block_size": engine.block_size,
        "batch": batch,
        "temperature": temperature,
        "tasks": len(tasks),
        "pass_at_1": float(answers.mean()),
        "standard_error": float(answers.std() / math.sqrt(len(answers))),
        "families": {family: float(np.mean(values)) for family, values in sorted(right.items())},
        "answer_tokens": sum(len(s.tokens) for s in samples) / len(samples),
        "tokens_per_forward": sum(len(s.tokens) for s in samples) / sum(s.forwards for s in samples),
        "tokens_per_step_by_position": _by_position(samples),
    }


def _by_position(samples: Sequence[Trajectory]) -> dict[str, float]:
    committed: dict[int, list[int]] = defaultdict(list)
    for sample in samples:
        for step in sample.trace[:-1]:  # the last one is cut short by the end
            place = (step.anchor + 1 - len(sample.prompt_tokens)) // _POSITIONS * _POSITIONS
            committed[place].append(step.accepted + 1)
    return {str(place): float(np.mean(counts)) for place, counts in sorted(committed.items())}


def _parent(config: ConversionConfig) -> Path | str | None:
    """The policy that was converted: the one given, or what the last autoregressive stage left."""
    stages = [stage.name for stage in config.stages if stage.kind == "ar"]
    output = Path(config.output)
    return output.with_name(f"{output.name}.{stages[-1]}") if stages else config.parent
