"""`blockroll bench decode`: how fast this machine decodes, and whether what it decoded is right.

Invariants:
- Everything compared runs in one process with one torch thread, in turn, on the same prompts: a round is `WAVES` batches
  of prompts through every contestant, and a figure is the median over three rounds or more. The first round warms up and
  is not counted.
- Each side serves the round as it would: our engine keeps `batch` samples running while there are more, `generate` takes
  one batch after another. Prefill is included, on both sides. Tokens count up to the one that ends a sample.
- Each of our rows carries the largest difference between its log-probabilities and a recomputation in the same run, and
  `coupled` whether its tokens were those of `ar`; a peer's row says whether its greedy tokens are ours.
- All prompts have one length: nobody pads, so no side is slowed by how the other would. They are held-out tasks of all
  families, each with as much of its worked answer as fills that length.
- A planner knows nothing when its first round begins; step times it takes from its table, or measures before.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ...errors import InvalidInput
from ...files import check_output, write_json
from ...model.backends import products
from ...model.checkpoint import load_policy
from ...model.device import placement
from ...model.policy import Policy
from ...model.scoring import score
from ...model.tasks import make_tasks
from ...model.tokenizer import encode_prompt
from ..engine import Engine, EngineConfig
from ..machine import describe, torch_threads
from ..progress import Meter
from ..schedule import Schedule
from ..types import RolloutRequest, SamplingParams, Trajectory
from .peers import PEERS, Decode, Prompts, load_transformers, make_peer

LEAST_ROUNDS = 3
WAVES = 4
"""Batches of prompts in a round."""
MOST_PROMPTS = 1 << 20
"""Rounds times the largest batch: their prompts are made before the first round."""
_RANDOM_PROMPT = 32
SCHEDULES = {
    "auto": Schedule("auto"), "ar": Schedule("ar"), "two_pass": Schedule("two_pass"),
    "fused": Schedule("fused"),
}  # fmt: skip
"""What `--schedule` may name."""


@dataclass
class _Contestant:
    """One engine with one way to decode."""

    engine: str
    sampler: str
    schedule: Schedule
    decode: Decode
    check: dict[str, Any]
    rates: list[float] = field(default_factory=list)
    tokens: int = 0
    forwards: int = 0


def bench_decode(
    policy_name: str | os.PathLike[str],
    *,
    batches: Sequence[int] = (1, 8),
    samplers: Sequence[str] = ("ar", "lossless"),
    schedule: str = "auto",
    peer: str | None = None,
    output: str | os.PathLike[str] | None = None,
    temperature: float = 1.0,
    max_tokens: int = 128,
    rounds: int = 5,
    device: str = "auto",
    dtype: str | None = None,
) -> list[dict[str, Any]]:
    """Measures each sampler (`ar` always) and the peer at each batch; prints a table, writes rows to `output` as JSON.

    Args:
        schedule: of the samplers but `ar`: one of `SCHEDULES`.
        peer: one or several of `PEERS`, separated by commas, or None.
        max_tokens: most tokens per sample, on every side.
        rounds: measured rounds, at least 3, after one that warms up.
        device, dtype: where and as what the policy runs, on every side (`model.device.placement`).

    Returns:
        Rows with `engine`, `sampler`, `schedule`, `levels`, `batch`, `context` (prompt tokens), `temperature`,
        `tokens_per_s` (median), `tokens_per_forward` (per sequence, prefill not counted), `ratio_to_ar` (to our own
        `ar` at the same batch), `max_tokens`, `rounds`, the check, `products` (who multiplies the clean rows of our engine),
        `planned` (with `auto`: steps by schedule), and `machine`: processor, cores, threads, versions and date. The
        figures of a peer that refuses the policy are null, and `unsupported` says why.

    Raises:
        InvalidInput: an unknown sampler, schedule or peer, or a number out of range.
    """
    for name in samplers:
        SamplingParams(sampler=name, temperature=temperature, max_tokens=max_tokens)  # type: ignore[arg-type]
    peers = [word.strip() for word in peer.split(",")] if peer else []
    for name in peers:
        if name not in PEERS:
            raise InvalidInput("peer", f"unknown peer {name!r}", f"use one of {', '.join(PEERS)}")
    if schedule not in SCHEDULES:
        raise InvalidInput("schedule", f"unknown schedule {schedule!r}", f"use one of {', '.join(SCHEDULES)}")
    if (smallest := min(batches, default=0)) < 1:
        raise InvalidInput("batch", f"{smallest} is less than 1", "use positive numbers")
    if rounds < LEAST_ROUNDS:
        raise InvalidInput("rounds", f"{rounds} is less than {LEAST_ROUNDS}", "a median of fewer says little")
    if max(batches) * rounds > MOST_PROMPTS:
        raise InvalidInput("rounds", f"{rounds} of batch {max(batches)} are more than {MOST_PROMPTS} in all", "lower one of them")
    if output is not None:
        check_output(output)
    order = list(dict.fromkeys(["ar", *samplers]))
    dtype, where = placement(device, dtype)
    policy = load_policy(policy_name, dtype, where)
    prompts = prompts_of_one_length(policy, max(batches) * WAVES * (rounds + 1))
    other = load_transformers(policy_name, policy) if peers else None

    rows: list[dict[str, Any]] = []
    steps = len(batches) * (rounds + 1) * (len(order) + len(peers))
    with torch_threads(1), Meter("bench decode", steps) as meter:
        machine = describe(where)
        for batch in batches:
            contestants = [
                _ours(policy, sampler, SCHEDULES["ar" if sampler == "ar" else schedule], batch, temperature, max_tokens)
                for sampler in order
            ]
            for name in peers:
                made = make_peer(name, policy, other, prompts[0], batch, temperature, max_tokens)
                contestants.append(_Contestant(name, "ar", Schedule("ar"), *made))
            for number in range(rounds + 1):
                chosen = prompts[number * WAVES * batch : (number + 1) * WAVES * batch]
                for contestant in contestants:
                    if "unsupported" in contestant.check:
                        meter.advance(0, 0)
                        continue
                    start = time.perf_counter()
                    tokens, forwards = contestant.decode(chosen, number)
                    seconds = time.perf_counter() - start
                    meter.advance(tokens, 0)
                    if number:
                        contestant.rates.append(tokens / seconds)
                        contestant.tokens += tokens
                        contestant.forwards += forwards
            common = {"batch": batch, "context": len(prompts[0]), "temperature": temperature, "max_tokens": max_tokens}
            rows += [_row(contestant, contestants[0]) | common | {"machine": machine} for contestant in contestants]
    if output is not None:
        write_json(output, rows)
    console = Console()
    console.print(f"{conclusion(rows)}\n", highlight=False, soft_wrap=True)
    console.print(_table(rows))
    console.print(f"\ntokens/s: median of {rounds} rounds, prefill included. per forward: tokens per decode forward, prefill left"
                  " out. x ar: tokens/s over those of our ar at this batch. check: largest difference of a log-probability from"
                  " a recomputation, or a peer's greedy tokens against ours.", highlight=False)  # fmt: skip
    console.print(f"products of clean rows: {products(policy)}")
    for name, why in {row["engine"]: row["unsupported"] for row in rows if "unsupported" in row}.items():
        console.print(f"{name} does not serve this policy: {why}")
    return rows


def conclusion(rows: Sequence[dict[str, Any]]) -> str:
    """One line: per batch what decodes fastest, over our `ar`; and the machine."""
    parts = []
    for batch in dict.fromkeys(row["batch"] for row in rows):
        some = [row for row in rows if row["batch"] == batch and row["tokens_per_s"]]
        fast = max(some, key=lambda row: row["tokens_per_s"])
        name = fast["sampler"] if fast["engine"] == "blockroll" else fast["engine"]
        parts.append(f"batch {batch}: {name}, {fast['ratio_to_ar']:.1f}x ar" if name != "ar" else f"batch {batch}: ar")
    return f"{rows[0]['machine']['processor']}, context {rows[0]['context']}, T={rows[0]['temperature']:g}: {'; '.join(parts)}"


def prompts_of_one_length(policy: Policy, count: int) -> list[tuple[int, ...]]:
    """Held-out tasks where the policy reads text, each with the beginning of its answer, else random tokens."""
    if policy.tokenizer is None:
        draw = random.Random(0)
        length = min(_RANDOM_PROMPT, policy.config.max_position_embeddings // 2)
        return [tuple(draw.randrange(policy.config.vocab_size) for _ in range(length)) for _ in range(count)]
    tokenizer = policy.tokenizer
    texts = [
        (encode_prompt(tokenizer, task.prompt), tokenizer.encode(task.completion, add_special_tokens=False))
        for task in make_tasks("heldout", 512)
    ]
    length = max(len(prompt) for prompt, _ in texts)
    alike = [tuple([*prompt, *answer][:length]) for prompt, answer in texts if len(prompt) + len(answer) > length]
    return [alike[i % len(alike)] for i in range(count)]


def _ours(
    policy: Policy, sampler: str, schedule: Schedule, batch: int, temperature: float, max_tokens: int
) -> _Contestant:
    # Rounds repeat prompts, and a peer prefills them again each time.
    engine = Engine(policy, EngineConfig(schedule=schedule, max_batch=batch, enable_prefix_caching=False))
    params = SamplingParams(sampler=sampler, temperature=temperature, max_tokens=max_tokens)  # type: ignore[arg-type]
    check: dict[str, Any] = {"max_logprob_error": 0.0, "products": products(policy)}

    def decode(prompts: Prompts, seed: int) -> tuple[int, int]:
        requests = [RolloutRequest(f"{seed}/{i}", p, params) for i, p in enumerate(prompts)]
        samples = engine.rollout(requests)
        if seed == 0:  # the round that is not timed
            again = score(policy, [(sample.prompt_tokens, sample.tokens) for sample in samples], temperature)
            errors = [np.abs(sample.logprobs - logprobs).max() for sample, logprobs in zip(samples, again, strict=True)]
            check["max_logprob_error"] = float(max(errors))
            if sampler == "coupled":
                check["tokens_equal_ar"] = _tokens(samples) == _tokens(_sample_ar(policy, requests))
        elif engine.planner is not None:
            check["planned"] = dict(Counter(decision.schedule.label for decision in engine.planner.log).most_common())
        return sum(len(sample.tokens) for sample in samples), sum(sample.forwards for sample in samples)

    return _Contestant("blockroll", sampler, schedule, decode, check)


def _sample_ar(policy: Policy, requests: Sequence[RolloutRequest]) -> list[Trajectory]:
    engine = Engine(policy, EngineConfig(schedule=Schedule("ar")))
    return engine.rollout([replace(request, params=replace(request.params, sampler="ar")) for request in requests])


def _tokens(samples: Sequence[Trajectory]) -> list[list[int]]:
    return [sample.tokens for sample in samples]


def _row(contestant: _Contestant, reference: _Contestant) -> dict[str, Any]:
    rate = statistics.median(contestant.rates) if contestant.rates else None
    schedule = contestant.schedule
    return {
        "engine": contestant.engine,
        "sampler": contestant.sampler,
        "schedule": schedule.kind,
        "levels": list(schedule.levels) if schedule.kind == "fused" else [],
        "tokens_per_s": rate,
        "tokens_per_forward": contestant.tokens / contestant.forwards if contestant.forwards else None,
        "ratio_to_ar": rate / statistics.median(reference.rates) if rate else None,
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
        if "unsupported" in row:
            table.add_row(row["engine"], row["sampler"], row["schedule"], str(row["batch"]), "-", "-", "-", "refused")
            continue
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
