"""`blockroll bench decode`: how fast this machine decodes, and whether what it decoded is right.

Invariants:
- Everything compared runs in one process with one torch thread, in turn, on the same prompts: a round is one batch
  through every contestant, and a figure is the median over three rounds or more. The first round warms up and is not
  counted.
- A batch is served to its end without refilling, prefill included, on both sides. Tokens count up to the one that ends
  a sample.
- Each of our rows carries the largest difference between its log-probabilities and a recomputation in the same run, and
  `coupled` whether its tokens were those of `ar`; a peer's row says whether its greedy tokens are ours.
- All prompts have one length: nobody pads, so no side is slowed by how the other would.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from ..errors import InvalidInput
from ..files import write_json
from ..model.checkpoint import load_policy, resolve
from ..model.policy import Policy
from ..model.scoring import score
from ..model.tasks import make_tasks
from ..model.tokenizer import encode_prompt
from .engine import Engine, EngineConfig
from .machine import describe
from .progress import Meter
from .schedule import Schedule
from .types import RolloutRequest, SamplingParams, Trajectory

PEERS = ("transformers",)
LEAST_ROUNDS = 3
_RANDOM_PROMPT = 32

Prompts = Sequence[tuple[int, ...]]


@dataclass
class _Contestant:
    """One engine with one way to decode; `decode(prompts, seed)` returns tokens and forwards, summed over samples."""

    engine: str
    sampler: str
    schedule: Schedule
    decode: Callable[[Prompts, int], tuple[int, int]]
    check: dict[str, Any]
    rates: list[float] = field(default_factory=list)
    tokens: int = 0
    forwards: int = 0


def bench_decode(
    policy_name: str | os.PathLike[str],
    *,
    batches: Sequence[int] = (1, 8),
    samplers: Sequence[str] = ("ar", "lossless"),
    peer: str | None = None,
    output: str | os.PathLike[str] | None = None,
    temperature: float = 1.0,
    max_tokens: int = 128,
    rounds: int = 5,
) -> list[dict[str, Any]]:
    """Measures each sampler (`ar` always) and the peer at each batch; prints a table, writes rows to `output` as JSON.

    Args:
        peer: `transformers`, or None.
        max_tokens: most tokens per sample, on every side.
        rounds: measured rounds, at least 3, after one that warms up.

    Returns:
        Rows with `engine`, `sampler`, `schedule`, `levels`, `batch`, `context` (prompt tokens), `temperature`,
        `tokens_per_s` (median), `tokens_per_forward` (per sequence, prefill not counted), `ratio_to_ar` (to our own
        `ar` at the same batch), `max_tokens`, `rounds`, the check, and `machine`: processor, cores, threads, versions
        and date.

    Raises:
        InvalidInput: an unknown sampler or peer, or a number out of range.
    """
    for name in samplers:
        SamplingParams(sampler=name, temperature=temperature, max_tokens=max_tokens)  # type: ignore[arg-type]
    if peer is not None and peer not in PEERS:
        raise InvalidInput("peer", f"unknown peer {peer!r}", f"use one of {', '.join(PEERS)}")
    if (smallest := min(batches, default=0)) < 1:
        raise InvalidInput("batch", f"{smallest} is less than 1", "use positive numbers")
    if rounds < LEAST_ROUNDS:
        raise InvalidInput("rounds", f"{rounds} is less than {LEAST_ROUNDS}", "a median of fewer says little")
    order = list(dict.fromkeys(["ar", *samplers]))
    policy = load_policy(policy_name)
    prompts = _prompts(policy, max(batches) * (rounds + 1))
    other = _load_transformers(policy_name) if peer else None

    rows: list[dict[str, Any]] = []
    steps = len(batches) * (rounds + 1) * (len(order) + (other is not None))
    with _one_thread(), Meter("bench decode", steps) as meter:
        machine = describe()
        for batch in batches:
            contestants = [_ours(policy, sampler, batch, temperature, max_tokens) for sampler in order]
            if other is not None:
                contestants.append(_transformers(policy, other, prompts[0], temperature, max_tokens))
            for number in range(rounds + 1):
                chosen = prompts[number * batch : (number + 1) * batch]
                for contestant in contestants:
                    start = time.perf_counter()
                    tokens, forwards = contestant.decode(chosen, number)
                    seconds = time.perf_counter() - start
                    meter.advance(tokens, 0)
                    if number:
                        contestant.rates.append(tokens / seconds)
                        contestant.tokens += tokens
                        contestant.forwards += forwards
            reference = statistics.median(contestants[0].rates)
            common = {"batch": batch, "context": len(prompts[0]), "temperature": temperature, "max_tokens": max_tokens}
            rows += [_row(contestant, reference) | common | {"machine": machine} for contestant in contestants]
    if output is not None:
        write_json(output, rows)
    Console().print(_table(rows))
    return rows


@contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread, as an engine's process has; threads that wait for each other blur every comparison."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _prompts(policy: Policy, count: int) -> list[tuple[int, ...]]:
    """Prompts of one length, so that no side pads: held-out tasks where the policy reads text, else random tokens."""
    if policy.tokenizer is None:
        draw = random.Random(0)
        length = min(_RANDOM_PROMPT, policy.config.max_position_embeddings // 2)
        return [tuple(draw.randrange(policy.config.vocab_size) for _ in range(length)) for _ in range(count)]
    encoded = [tuple(encode_prompt(policy.tokenizer, task.prompt)) for task in make_tasks("heldout", 512)]
    (usual, _), = Counter(map(len, encoded)).most_common(1)
    alike = [prompt for prompt in encoded if len(prompt) == usual]
    return [alike[i % len(alike)] for i in range(count)]


def _load_transformers(policy_name: str | os.PathLike[str]) -> Any:
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(resolve(policy_name), dtype=torch.float32).eval()


def _ours(policy: Policy, sampler: str, batch: int, temperature: float, max_tokens: int) -> _Contestant:
    schedule = Schedule("ar") if sampler == "ar" else Schedule("fused", levels=(0, 4, 8))
    engine = Engine(policy, EngineConfig(schedule=schedule, max_batch=batch))
    params = SamplingParams(sampler=sampler, temperature=temperature, max_tokens=max_tokens)  # type: ignore[arg-type]
    check: dict[str, Any] = {"max_logprob_error": 0.0}

    def decode(prompts: Prompts, seed: int) -> tuple[int, int]:
        requests = [RolloutRequest(f"{seed}/{i}", p, params, seed=1000 * seed + i) for i, p in enumerate(prompts)]
        samples = engine.generate(requests)
        if seed == 0:  # the round that is not timed
            again = score(policy, [(sample.prompt_tokens, sample.tokens) for sample in samples], temperature)
            errors = [np.abs(sample.logprobs - logprobs).max() for sample, logprobs in zip(samples, again, strict=True)]
            check["max_logprob_error"] = float(max(errors))
            if sampler == "coupled":
                check["tokens_equal_ar"] = _tokens(samples) == _tokens(_sample_ar(policy, requests))
        return sum(len(sample.tokens) for sample in samples), sum(sample.forwards for sample in samples)

    return _Contestant("blockroll", sampler, schedule, decode, check)


def _sample_ar(policy: Policy, requests: Sequence[RolloutRequest]) -> list[Trajectory]:
    engine = Engine(policy, EngineConfig(schedule=Schedule("ar"), max_batch=len(requests)))
    return engine.generate([replace(request, params=replace(request.params, sampler="ar")) for request in requests])


def _tokens(samples: Sequence[Trajectory]) -> list[list[int]]:
    return [sample.tokens for sample in samples]


def _transformers(
    policy: Policy, model: Any, prompt: tuple[int, ...], temperature: float, max_tokens: int
) -> _Contestant:
    ends = list(policy.eos_token_ids)

    def generate(prompts: Prompts, **options: Any) -> list[list[int]]:
        tokens = torch.tensor(prompts)
        with torch.inference_mode():
            made = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=max_tokens, eos_token_id=ends or None,
                pad_token_id=ends[0] if ends else 0, **options,
            )
        return [_until_end(row, ends) for row in made[:, tokens.shape[1] :].tolist()]

    def decode(prompts: Prompts, seed: int) -> tuple[int, int]:
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        count = sum(map(len, generate(prompts, **(sampling if temperature > 0 else {"do_sample": False}))))
        return count, count

    greedy = SamplingParams(sampler="ar", temperature=0.0, max_tokens=max_tokens)
    mine = Engine(policy, EngineConfig(schedule=Schedule("ar"), max_batch=1)).generate(
        [RolloutRequest("greedy", prompt, greedy)]
    )
    check = {"greedy_tokens_equal": generate([prompt], do_sample=False)[0] == mine[0].tokens}
    return _Contestant("transformers", "ar", Schedule("ar"), decode, check)


def _until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: stop + 1]


def _row(contestant: _Contestant, reference: float) -> dict[str, Any]:
    rate = statistics.median(contestant.rates)
    schedule = contestant.schedule
    return {
        "engine": contestant.engine,
        "sampler": contestant.sampler,
        "schedule": schedule.kind,
        "levels": list(schedule.levels) if schedule.kind == "fused" else [],
        "tokens_per_s": rate,
        "tokens_per_forward": contestant.tokens / contestant.forwards,
        "ratio_to_ar": rate / reference,
        "rounds": len(contestant.rates),
        **contestant.check,
    }


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("engine", "sampler", "schedule"):
        table.add_column(heading, no_wrap=True)
    for heading in ("batch", "tokens/s", "per forward", "x ar", "check"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if "greedy_tokens_equal" in row:
            check = "greedy equal" if row["greedy_tokens_equal"] else "greedy differs"
        else:
            check = f"logp ± {row['max_logprob_error']:.0e}"
            if "tokens_equal_ar" in row:
                check += ", = ar" if row["tokens_equal_ar"] else ", NOT ar"
        table.add_row(
            row["engine"], row["sampler"], row["schedule"], str(row["batch"]), f"{row['tokens_per_s']:,.0f}",
            f"{row['tokens_per_forward']:.2f}", f"{row['ratio_to_ar']:.2f}", check,
        )
    return table
