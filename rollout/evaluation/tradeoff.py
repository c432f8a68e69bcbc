"""`blockroll tradeoff`: what ways to decode cost in tokens, forwards and seconds, and what they are worth.

Invariants:
- Accuracy, tokens and forwards of a way come from the same samples. Sample seeds depend on (seed, task) alone, so `ar` and
  `coupled` answer alike.
- Seconds are measured apart, interleaved: in each round every way decodes the same prompts at the same batch, one after
  another. The first round warms up and is not counted. Prefill is included. Seconds are medians over the rounds, and so are a
  way's seconds over those of `ar`, which are compared round by round: a machine that is slower for a while is so for all ways.
- Of k samples the cost is k times that of one. Every figure stands with batch, temperature, sampler, schedule and machine.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...errors import InvalidInput
from ...files import check_output, write_json
from ...model.arguments import short
from ...model.checkpoint import load_policy, resolve
from ...model.device import placement
from ...model.policy import Policy
from ...model.tasks import Task, make_tasks, score
from ...model.tokenizer import encode_prompt
from ...seeds import MAX_SEED, derived_seed
from ..engine import Engine, EngineConfig
from ..machine import describe, torch_threads
from ..offline import pool_size, serve
from ..params import SAMPLERS
from ..progress import Meter
from ..schedule import DEFAULT_LEVELS, Schedule
from ..search.estimators import majority_at_k, pass_at_k
from ..search.functions import answer_function
from ..types import RolloutRequest, SamplerName, SamplingParams, Trajectory
from .counts import by_task, mean, ratio
from .decoding import tokenizer_of
from .options import DecodingOptions
from .tradeoff_plot import draw, reach

LEAST_ROUNDS = 3
_NAME = 22
"""Characters of the name of a way."""
MAX_TASKS, MAX_SAMPLES, MAX_BATCH = 100_000, 1024, 4096
"""Trajectories of one way are kept until its figures are known."""
MAX_THREADS = 1024


@dataclass(frozen=True, kw_only=True)
class TradeoffOptions(DecodingOptions):
    """What `blockroll tradeoff` measures.

    Attributes:
        tasks, samples: held-out tasks, and samples of each; k goes over the powers of two up to `samples`.
        samplers: `ar` is always measured.
        level_counts: how many proposals a fused step drafts. planner: also measure `lossless` with the schedule `auto`.
        batches: samples decoded at once where seconds are measured. rounds: measured rounds, 3 or more. clock_tasks: tasks of
        a round.
        batch: samples decoded at once where accuracy is measured.
        threads: of torch, and of an engine's passes on a CPU; None for as many as torch has.
    """

    tasks: int = 400
    samples: int = 16
    temperature: float = 1.0
    samplers: tuple[SamplerName, ...] = ("ar", "lossless", "coupled", "mixed")
    level_counts: tuple[int, ...] = (3, 5, 8, 16)
    planner: bool = True
    batches: tuple[int, ...] = (1, 2, 4, 8)
    rounds: int = 5
    clock_tasks: int = 16
    batch: int = 64
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, least, most in (("tasks", 1, MAX_TASKS), ("samples", 1, MAX_SAMPLES), ("rounds", LEAST_ROUNDS, 1000),
                                  ("clock_tasks", 1, MAX_TASKS), ("batch", 1, MAX_BATCH), ("seed", 0, MAX_SEED)):  # fmt: skip
            self._within(name, getattr(self, name), least, most)
        if self.threads is not None:
            self._within("threads", self.threads, 1, MAX_THREADS)
        for name, most in (("level_counts", 64), ("batches", MAX_BATCH)):
            if not getattr(self, name):
                raise InvalidInput(name, "none are given", "give at least one")
            for value in getattr(self, name):
                self._within(name, value, 1, most)
        if "mixed" in self.samplers and not self.mix_weights:
            raise InvalidInput("mix_weights", "none are given", "give at least one")
        for sampler in self.samplers:
            if sampler not in SAMPLERS:
                raise InvalidInput("samplers", f"unknown sampler {short(sampler)}", f"use some of {', '.join(SAMPLERS)}")
        for way in self.ways(64):
            way.params(self)

    @staticmethod
    def _within(name: str, value: int, least: int, most: int) -> None:
        if not least <= value <= most:
            raise InvalidInput(name, f"{value} is outside {least}..{most}", "use a number in that range")

    def ways(self, block_size: int) -> list[Way]:
        """The ways that are compared, `ar` first."""
        made = [Way("ar", Schedule("ar"))]
        for sampler in dict.fromkeys(self.samplers):
            if sampler == "ar":
                continue
            for weight in dict.fromkeys(self.mix_weights) if sampler == "mixed" else (None,):
                made += [Way(sampler, Schedule("fused", levels=levels_of(count, block_size)), weight)
                         for count in dict.fromkeys(self.level_counts)]  # fmt: skip
            if sampler == "lossless" and self.planner:
                made.append(Way(sampler, Schedule("auto")))
        return made


@dataclass
class Way:
    """One way to decode, and the seconds of its samples by batch and round."""

    sampler: SamplerName
    schedule: Schedule
    weight: float | None = None
    seconds: dict[int, list[float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As tables and plots name it: `mixed(0.5), 8 levels`."""
        sampler = self.sampler if self.weight is None else f"{self.sampler}({self.weight:g})"
        if self.schedule.kind == "ar":
            return sampler
        return f"{sampler}, {'planner' if self.schedule.kind == 'auto' else f'{len(self.schedule.levels)} levels'}"

    def over(self, other: Way, batch: int) -> float:
        """Its seconds over those of the other way: the median of the rounds' ratios."""
        return statistics.median(mine / its for mine, its in zip(self.seconds[batch], other.seconds[batch], strict=True))

    def params(self, options: TradeoffOptions) -> SamplingParams:
        """As its requests carry them."""
        weight = 0.5 if self.weight is None else self.weight
        return SamplingParams(self.sampler, options.temperature, mix_weight=weight, max_tokens=options.max_tokens)


def levels_of(count: int, block_size: int) -> tuple[int, ...]:
    """So many levels, spread over a block; {0, 4, 8}, the default, for three."""
    levels = DEFAULT_LEVELS if count == len(DEFAULT_LEVELS) else tuple(i * block_size // count for i in range(count))
    return tuple(sorted({min(level, block_size - 1) for level in levels}))


def tradeoff(
    policy_name: str | os.PathLike[str], options: TradeoffOptions | None = None, *,
    json_path: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measures the ways; writes the report to `json_path`, with a plot beside it (`.png`).

    Returns:
        The report. `ways` hold `name`, `sampler`, `schedule`, `levels`, `mix_weight`, `tokens_per_forward`, `tokens` and
        `forwards` of a sample, `pass_at` and `majority_at` by k, `standard_error` of these, `seconds` of a sample and
        `ratio_to_ar` by batch, and `reach`: by batch, the seconds at which each of AR's majority@k is reached, over AR's own.

    Raises:
        InvalidInput: a policy without a tokenizer, or an option out of range. StorageError: a file could not be written whole.
    """
    options = options or TradeoffOptions()
    if json_path is not None:
        picture = Path(json_path).with_suffix(".png")
        check_output(json_path)
        check_output(picture, json_path)
    dtype, device = placement(options.device, options.dtype)
    policy = load_policy(policy_name, dtype, device)
    tasks = make_tasks("heldout", options.tasks, options.seed)
    tokenizer_of(policy, tasks)
    ways = options.ways(policy.block_size)
    with torch_threads(options.threads):
        machine = describe(device)
        rows = [_figures(policy, tasks, way, options) for way in ways]
        _clock(policy, tasks, ways, options)
    for way, row in zip(ways, rows, strict=True):
        row["seconds"] = {str(batch): statistics.median(times) for batch, times in way.seconds.items()}
        row["ratio_to_ar"] = {str(batch): way.over(ways[0], batch) for batch in way.seconds}
        row["reach"] = {batch: reach(rows[0], row, ratio) for batch, ratio in row["ratio_to_ar"].items()}
    report = dict(
        policy=resolve(policy_name).name, tasks=options.tasks, samples=options.samples, temperature=options.temperature,
        max_tokens=options.max_tokens, seed=options.seed, block_size=policy.block_size, batch=options.batch, dtype=dtype,
        k=list(options.powers), batches=list(options.batches), rounds=options.rounds, clock_tasks=options.clock_tasks, ways=rows,
        machine=machine,
    )  # fmt: skip
    if json_path is not None:
        write_json(json_path, report)
        draw(report, picture)
    return report


def table(report: Mapping[str, Any]) -> list[str]:
    """The report's figures, a line per way, below a line that says what they are."""
    batches, last = [str(batch) for batch in report["batches"]], str(report["k"][-1])
    head = ["way", "tokens/forward", *(f"s / ar's, batch {batch}" for batch in batches), "pass@1", f"majority@{last}",
            f"pass@{last}"]  # fmt: skip
    lines = [
        f"{report['policy']}, {report['tasks']} held-out tasks, {report['samples']} samples, T={report['temperature']:g}; seconds"
        f" of a sample over those of ar, interleaved, median of {report['rounds']} rounds of {report['clock_tasks']} tasks",
        _columns(head, head),
    ]
    for way in report["ways"]:
        cells = [way["name"], f"{way['tokens_per_forward']:.2f}", *(f"{way['ratio_to_ar'][batch]:.2f}" for batch in batches),
                 f"{way['pass_at']['1']:.3f}", f"{way['majority_at'][last]:.3f}", f"{way['pass_at'][last]:.3f}"]  # fmt: skip
        lines.append(_columns(cells, head))
    return lines


def _columns(cells: Sequence[str], head: Sequence[str]) -> str:
    """A line of a table: the first column has names."""
    widths = [_NAME, *map(len, head[1:])]
    return "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _engine(policy: Policy, way: Way, batch: int, longest: int, keep: bool) -> Engine:
    config = EngineConfig(schedule=way.schedule, max_batch=batch, enable_prefix_caching=keep)
    return Engine(policy, replace(config, pages=pool_size(longest, policy, config)))


def _requests(
    policy: Policy, tasks: Sequence[Task], way: Way, options: TradeoffOptions, samples: int, name: str = ""
) -> list[RolloutRequest]:
    params = way.params(options)
    return [RolloutRequest(f"{name}{task.id}", tuple(encode_prompt(policy.tokenizer, task.prompt)), params,
                           derived_seed(options.seed, f"{name}{task.id}"), samples) for task in tasks]  # fmt: skip


def _figures(policy: Policy, tasks: Sequence[Task], way: Way, options: TradeoffOptions) -> dict[str, Any]:
    """What a way's samples are worth, and how many tokens and forwards they take."""
    requests = _requests(policy, tasks, way, options, options.samples)
    longest = max(len(request.prompt_tokens) for request in requests) + options.max_tokens
    engine = _engine(policy, way, options.batch, longest, keep=True)
    made: list[Trajectory] = []
    with Meter(way.name, len(tasks) * options.samples) as meter:
        for sample in serve(engine, requests, 2 * options.batch):
            made.append(sample)
            meter.advance(len(sample.tokens), sample.forwards)
    find = answer_function("task")
    votes: dict[str, dict[str, int]] = {task.id: {} for task in tasks}
    right: dict[str, set[str]] = {task.id: set() for task in tasks}
    hits = dict.fromkeys(votes, 0)
    by_id = {task.id: task for task in tasks}
    for sample in made:
        text = sample.text(policy.tokenizer)
        found = find(text) if sample.finish_reason == "stop" else None
        if found is None:
            continue
        name = sample.request_id
        votes[name][found] = votes[name].get(found, 0) + 1
        if score(by_id[name], text) == 1.0:
            right[name].add(found)
            hits[name] += 1
    n, counts = options.samples, by_task(made, lambda sample: len(sample.tokens))
    forwards = by_task(made, lambda sample: sample.forwards)
    estimates: dict[str, Any] = {
        "tokens_per_forward": ratio(counts, forwards),
        "tokens": mean([count / n for count in counts]), "forwards": mean([count / n for count in forwards]),
        "pass_at": {str(k): mean([pass_at_k(n, hits[t], k) for t in votes]) for k in options.powers},
        "majority_at": {str(k): mean([majority_at_k(votes[t], right[t], n, k) for t in votes]) for k in options.powers},
    }  # fmt: skip
    levels = list(way.schedule.levels) if way.schedule.kind == "fused" else []
    row = {"name": way.name, "sampler": way.sampler, "schedule": way.schedule.kind, "levels": levels, "mix_weight": way.weight}
    return row | {name: _part(value, 0) for name, value in estimates.items()} | {
        "standard_error": {name: _part(value, 1) for name, value in estimates.items()}}  # fmt: skip


def _part(value: Any, index: int) -> Any:
    return {k: pair[index] for k, pair in value.items()} if isinstance(value, dict) else value[index]


def _clock(policy: Policy, tasks: Sequence[Task], ways: Sequence[Way], options: TradeoffOptions) -> None:
    """Fills in the seconds of the ways."""
    longest = max(len(encode_prompt(policy.tokenizer, task.prompt)) for task in tasks) + options.max_tokens
    with Meter("seconds", len(options.batches) * (options.rounds + 1) * len(ways)) as meter:
        for batch in options.batches:
            engines = [_engine(policy, way, batch, longest, keep=False) for way in ways]
            for number in range(options.rounds + 1):
                first, most = number * options.clock_tasks, min(options.clock_tasks, len(tasks))
                chosen = [tasks[(first + i) % len(tasks)] for i in range(most)]
                for way, engine in zip(ways, engines, strict=True):
                    requests = _requests(policy, chosen, way, options, 1, f"{number}/")
                    start = time.perf_counter()
                    made = engine.rollout(requests)
                    seconds = (time.perf_counter() - start) / len(made)
                    meter.advance(sum(len(sample.tokens) for sample in made), 0)
                    if number:
                        way.seconds.setdefault(batch, []).append(seconds)
