"""`blockroll bench planner`: compares the planner with every fixed schedule on the same requests.

The workload is a fixed list of requests, all there at the start, that end one after another: the batch falls from its
largest to 1, and no schedule is best all the way.

Invariants:
- All schedules serve the same requests in turn, round by round, in one process with one torch thread; figures are medians
  over three rounds or more. A first round warms up and is not counted; in it the planner learns how far drafts survive.
- Seconds are those of `step_costs.clock`, which the planner decides by: on a CPU the engine's own thread, so that work
  beside it counts for nobody.
- With `coupled` everyone must make the same tokens, which is checked: then times compare directly. With other samplers
  tokens differ, and what compares is tokens per second.
"""

from __future__ import annotations

import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from ...errors import InvalidInput
from ...files import check_output, write_json
from ...model.checkpoint import load_policy
from ...model.device import placement
from ...model.policy import Policy
from ...seeds import derived_seed
from ..engine import Engine, EngineConfig
from ..machine import describe, torch_threads
from ..planning.planner import Decision, candidates
from ..planning.step_costs import clock
from ..progress import Meter
from ..schedule import Schedule
from ..types import RolloutRequest, SamplingParams
from .decode import LEAST_ROUNDS, MOST_PROMPTS, prompts_of_one_length


@dataclass
class _Contestant:
    """One engine; per round the seconds and tokens of all its steps, and of those at each batch."""

    label: str
    engine: Engine
    seconds: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    at: dict[int, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0]))
    chosen: list[Decision] = field(default_factory=list)


def bench_planner(
    policy_name: str | os.PathLike[str],
    *,
    batch: int = 32,
    sampler: str = "coupled",
    temperature: float = 1.0,
    max_tokens: int = 128,
    rounds: int = 5,
    output: str | os.PathLike[str] | None = None,
    device: str = "auto",
    dtype: str | None = None,
    everything: bool = False,
) -> dict[str, Any]:
    """Measures the planner and each schedule it may choose; prints two tables, writes `output` as JSON.

    Args:
        batch: requests, all running at first.
        max_tokens: of the longest request; the others may make evenly fewer.
        everything: print every schedule, not the fastest ones alone.
        device, dtype: where and as what the policy runs (`model.device.placement`).

    Returns:
        `rows` (by median seconds of a round: `schedule`, `seconds`, `tokens_per_s`, `ratio_to_best`: its speed over that
        of the best fixed schedule, median over rounds), `best` (that schedule), `planner_ratio`, `by_batch` (per range of
        batches: `best`, `best_tokens_per_s`, `planner_tokens_per_s`, `chosen`: steps by schedule), `tokens_equal`, and the
        conditions.

    Raises:
        InvalidInput: an unknown sampler, or a number out of range.
    """
    if rounds < LEAST_ROUNDS:
        raise InvalidInput("rounds", f"{rounds} is less than {LEAST_ROUNDS}", "a median of fewer says little")
    if batch < 1:
        raise InvalidInput("batch", f"{batch} is less than 1", "use a positive number")
    if batch * rounds > MOST_PROMPTS:
        raise InvalidInput("rounds", f"{rounds} of batch {batch} are more than {MOST_PROMPTS} in all", "lower one of them")
    if output is not None:
        check_output(output)
    SamplingParams(sampler=sampler, temperature=temperature, max_tokens=max_tokens)  # type: ignore[arg-type]
    dtype, where = placement(device, dtype)
    policy = load_policy(policy_name, dtype, where)
    schedules = candidates(policy.block_size)
    same = True
    with torch_threads(1), Meter("bench planner", (rounds + 1) * (len(schedules) + 1)) as meter:
        machine = describe(where)
        contestants = [_Contestant(s.label, Engine(policy, EngineConfig(s, max_batch=batch))) for s in schedules]
        auto = _Contestant("auto", Engine(policy, EngineConfig(Schedule("auto"), max_batch=batch)))
        for number in range(rounds + 1):
            requests = _requests(policy, batch, sampler, temperature, max_tokens, number)
            made = []
            for contestant in (*contestants, auto):
                tokens = _serve(contestant, requests, counted=number > 0)
                made.append(tokens)
                meter.advance(sum(map(len, tokens)), 0)
            same = same and all(tokens == made[0] for tokens in made)
    result = _compare(contestants, auto) | {
        "tokens_equal": same if sampler == "coupled" else None, "batch": batch, "sampler": sampler, "rounds": rounds,
        "temperature": temperature, "max_tokens": max_tokens, "machine": machine,
    }  # fmt: skip
    if output is not None:
        write_json(output, result)
    _print(result, everything)
    return result


def _requests(
    policy: Policy, batch: int, sampler: str, temperature: float, max_tokens: int, number: int
) -> list[RolloutRequest]:
    prompts = prompts_of_one_length(policy, batch * (number + 1))[-batch:]
    params = [
        SamplingParams(sampler=sampler, temperature=temperature, max_tokens=max(max_tokens * (i + 1) // batch, 1))  # type: ignore[arg-type]
        for i in range(batch)
    ]
    return [RolloutRequest(f"{i}", prompts[i], params[i], seed=derived_seed(number, str(i))) for i in range(batch)]


def _serve(contestant: _Contestant, requests: Sequence[RolloutRequest], counted: bool) -> list[list[int]]:
    engine, now, done, total = contestant.engine, clock(contestant.engine.policy), [], 0.0
    tokens_before = engine.decode_tokens
    for request in requests:
        engine.add(request)
    while engine.has_work:
        running, before = len(engine.scheduler.running) or len(requests), engine.decode_tokens
        start = now()
        done += engine.step()
        seconds = now() - start
        total += seconds
        if counted:
            at = contestant.at[running]
            at[0], at[1] = at[0] + seconds, at[1] + engine.decode_tokens - before
    if counted:
        contestant.seconds.append(total)
        contestant.rates.append((engine.decode_tokens - tokens_before) / total)
        if engine.planner is not None:
            contestant.chosen += engine.planner.log
    if engine.planner is not None:
        engine.planner.log.clear()
    return [sample.tokens for sample in sorted(done, key=lambda sample: int(sample.request_id))]


def _compare(contestants: Sequence[_Contestant], auto: _Contestant) -> dict[str, Any]:
    best = min(contestants, key=lambda c: statistics.median(c.seconds))
    rows = [
        {
            "schedule": c.label,
            "seconds": statistics.median(c.seconds),
            "tokens_per_s": statistics.median(c.rates),
            "ratio_to_best": statistics.median(mine / its for mine, its in zip(c.rates, best.rates, strict=True)),
        }
        for c in (*contestants, auto)
    ]
    by_batch = []
    largest = max(auto.at)
    low = 1
    while low <= largest:
        high = min(2 * low - 1, largest)
        rates = {c.label: _rate(c, low, high) for c in contestants}
        leader = max(rates, key=lambda label: rates[label])
        chosen = Counter(d.schedule.label for d in auto.chosen if low <= d.batch <= high)
        by_batch.append({
            "from": low, "to": high, "best": leader, "best_tokens_per_s": rates[leader],
            "planner_tokens_per_s": _rate(auto, low, high), "chosen": dict(chosen.most_common()),
        })  # fmt: skip
        low = high + 1
    return {
        "rows": sorted(rows, key=lambda row: row["seconds"]), "best": best.label,
        "planner_ratio": rows[-1]["ratio_to_best"], "by_batch": by_batch,
    }  # fmt: skip


def _rate(contestant: _Contestant, low: int, high: int) -> float:
    """Tokens per second over the steps that ran with `low` to `high` samples."""
    spent = [contestant.at[batch] for batch in range(low, high + 1) if batch in contestant.at]
    seconds = sum(s for s, _ in spent)
    return sum(tokens for _, tokens in spent) / seconds if seconds else 0.0


SHOWN = 3
"""Schedules in the table, unless all are asked for; the planner is always among them."""


def conclusion(result: dict[str, Any]) -> str:
    """One line: the planner against the best fixed schedule in hindsight."""
    return (f"{result['machine']['processor']}, batch {result['batch']} falling to 1, {result['sampler']}: the planner"
            f" makes {result['planner_ratio']:.2f}x the tokens/s of {result['best']}, the best fixed schedule in"
            " hindsight")  # fmt: skip


def _print(result: dict[str, Any], everything: bool) -> None:
    totals = Table(box=None, pad_edge=False)
    totals.add_column("schedule", no_wrap=True)
    for heading in ("seconds", "tokens/s", "x best"):
        totals.add_column(heading, justify="right", no_wrap=True)
    shown = [row for i, row in enumerate(result["rows"]) if everything or i < SHOWN or row["schedule"] == "auto"]
    for row in shown:
        totals.add_row(row["schedule"], f"{row['seconds']:.2f}", f"{row['tokens_per_s']:,.0f}", f"{row['ratio_to_best']:.2f}")
    ranges = Table(box=None, pad_edge=False)
    for heading in ("batch", "best", "tokens/s", "planner", "chose"):
        ranges.add_column(heading, no_wrap=True)
    for part in result["by_batch"]:
        steps = sum(part["chosen"].values())
        often = [f"{label} {100 * count / steps:.0f}%" for label, count in list(part["chosen"].items())[:2]]
        batches = str(part["from"]) if part["from"] == part["to"] else f"{part['from']}-{part['to']}"
        ranges.add_row(batches, part["best"], f"{part['best_tokens_per_s']:,.0f}", f"{part['planner_tokens_per_s']:,.0f}",
                       ", ".join(often))
    console = Console()
    console.print(f"{conclusion(result)}\n", highlight=False, soft_wrap=True)
    console.print(totals)
    left = len(result["rows"]) - len(shown)
    if left:
        console.print(f"--all: {left} slower schedules", highlight=False)
    console.print("Above: median seconds of a round, tokens/s, and tokens/s over those of the best fixed schedule; auto is the"
                  " planner. Below: while so many samples ran, the best fixed schedule, its tokens/s, the planner's, and the"
                  " schedules that the planner chose most.\n", highlight=False)  # fmt: skip
    console.print(ranges)
    if result["tokens_equal"] is not None:
        console.print("tokens: the same from every schedule" if result["tokens_equal"] else "tokens: NOT THE SAME")
