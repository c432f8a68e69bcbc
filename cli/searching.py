"""Commands that sample many answers and make one of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import (
    LEVELS,
    DeviceOption,
    DtypeOption,
    NamedPolicy,
    PolicyArgument,
    integers,
    numbers,
    one_policy,
    words,
)


def sample(
    policy: PolicyArgument = None,
    named: NamedPolicy = None,
    input: Annotated[
        Path | None,
        typer.Option("--input", metavar="FILE", help="*.jsonl: lines {id, prompt or prompt_tokens}; else a prompt per line."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="One prompt.", show_default=False)] = None,
    tasks: Annotated[int | None, typer.Option(help="This many held-out tasks.", show_default=False)] = None,
    questions: Annotated[
        bool, typer.Option("--questions", help='Prompts are questions for the shipped policies, such as "47 + 85".')
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="JSONL, written whole or not at all; else standard output.")
    ] = None,
    method: Annotated[
        str, typer.Option(metavar="majority|weighted_vote|best_of_n|self_consistency|beam|markovian_rsa|budget_forcing")
    ] = "majority",
    samples: Annotated[
        int | None,
        typer.Option(help="Samples, beams, or candidates of a round; default 16, or a budget's.", show_default=False),
    ] = None,
    budget_tokens: Annotated[int | None, typer.Option(help="Most generated tokens per question.", show_default=False)] = None,
    budget_seconds: Annotated[float | None, typer.Option(help="Most seconds per question.", show_default=False)] = None,
    answer: Annotated[str, typer.Option(metavar="task|text|module:function", help="How an answer is found in a text.")] = "task",
    scorer: Annotated[
        str | None,
        typer.Option(metavar="logprob|mean_logprob|verifier|module:function", help="Of best_of_n, weighted_vote and beam."),
    ] = None,
    stop_rule: Annotated[
        str | None, typer.Option(metavar="beta|dirichlet|certain", help="self_consistency; default beta.")
    ] = None,
    confidence: Annotated[float | None, typer.Option(help="self_consistency; default 0.95.", show_default=False)] = None,
    width: Annotated[int | None, typer.Option(help="beam: samples per beam and step; default 4.", show_default=False)] = None,
    step_end: Annotated[str | None, typer.Option(help="beam: text that ends a step; default ;", show_default=False)] = None,
    aggregate: Annotated[int | None, typer.Option(help="markovian_rsa: C; default 4.", show_default=False)] = None,
    rounds: Annotated[int | None, typer.Option(help="markovian_rsa: T; default 2.", show_default=False)] = None,
    tail: Annotated[int | None, typer.Option(help="markovian_rsa: tau; default half of max-tokens.", show_default=False)] = None,
    aggregation: Annotated[
        str | None, typer.Option(help="markovian_rsa: the prompt, with {question} and {candidates}.", show_default=False)
    ] = None,
    force: Annotated[str | None, typer.Option(help="budget_forcing: text that begins the answer.", show_default=False)] = None,
    answer_tokens: Annotated[
        int | None, typer.Option(help="budget_forcing: kept for it; default 16.", show_default=False)
    ] = None,
    extend: Annotated[
        str | None, typer.Option(help="budget_forcing: text in place of an early answer.", show_default=False)
    ] = None,
    extensions: Annotated[int | None, typer.Option(help="budget_forcing: how many times.", show_default=False)] = None,
    sampler: Annotated[str, typer.Option(metavar="ar|lossless|coupled|mixed", help="How tokens are drawn.")] = "lossless",
    mix_weight: Annotated[float, typer.Option(help="mixed: weight of p's logits.")] = 0.5,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="1.0 keeps every token.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Most tokens per sample.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the tasks, and with a question's id of its samples.")] = 0,
    candidates: Annotated[bool, typer.Option("--candidates", help="Write every candidate too.")] = False,
    schedule: Annotated[
        str, typer.Option(metavar="auto|ar|two_pass|fused", help="What a step runs, without --address.")
    ] = "fused",
    levels: Annotated[str, typer.Option(help="fused: acceptance lengths drafted for.")] = LEVELS,
    batch: Annotated[int, typer.Option(help="Samples decoded at once.")] = 32,
    address: Annotated[
        str | None, typer.Option(metavar="tcp://HOST:PORT", help="A service samples instead of this process.", show_default=False)
    ] = None,
    keys: Annotated[Path | None, typer.Option(metavar="DIR", help="Keys of that service.", show_default=False)] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
) -> None:
    """Sample many answers to each question and make one of them: best of n, votes, beam search, aggregation.

    Output lines: {"id", "method", "answer", "text", "logprob", "score", "votes", "candidates", "reason", "spent": {"tokens",
    "forwards", "seconds", "samples", "cancelled"}}, for tasks with "right".

    \b
    Example:
      blockroll sample tiny-reasoner --prompt "47 + 85 - 12" --questions --method self_consistency
      blockroll sample tiny-reasoner --tasks 100 --method majority --budget-tokens 1000 --output answers.jsonl
    """
    from ..rollout.schedule import Schedule
    from ..rollout.search.config import SearchConfig
    from ..rollout.search.sample_file import Prompts, sample_file
    from ..rollout.types import SamplingParams

    given = dict(
        samples=samples, scorer=scorer, stop_rule=stop_rule, confidence=confidence, width=width, step_end=step_end,
        aggregate=aggregate, rounds=rounds, tail=tail, aggregation=aggregation, force=force, answer_tokens=answer_tokens,
        extend=extend, extensions=extensions, budget_tokens=budget_tokens, budget_seconds=budget_seconds,
    )  # fmt: skip
    fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if samples is None and (budget_tokens or budget_seconds) and method not in ("beam", "markovian_rsa"):
        fields["samples"] = None
    config = SearchConfig.from_mapping(fields | {"method": method, "answer": answer, "seed": seed}, functions=True)
    params = SamplingParams(
        sampler=sampler,  # type: ignore[arg-type]  # validated by the class
        temperature=temperature, top_p=top_p, mix_weight=mix_weight, max_tokens=max_tokens,
    )
    prompts = Prompts(input, prompt, tasks, questions)
    connect = None if address is None else _service(address, keys)
    summary = sample_file(
        one_policy(policy, named), prompts, config, params, output=output, connect=connect, batch=batch, device=device,
        dtype=dtype, schedule=Schedule(schedule, levels=integers("levels", levels)), candidates=candidates,  # type: ignore[arg-type]
    )
    print(summary, file=sys.stderr if output is None else sys.stdout)


def tradeoff(
    policy: PolicyArgument = None,
    named: NamedPolicy = None,
    tasks: Annotated[int, typer.Option(help="Held-out tasks.")] = 400,
    samples: Annotated[int, typer.Option(help="Of each task; k goes over the powers of two up to it.")] = 16,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    samplers: Annotated[str, typer.Option(help="Beside ar, which is always measured.")] = "lossless,coupled,mixed",
    mix_weights: Annotated[str, typer.Option(help="mixed: weights of p's logits.")] = "0.25,0.5,0.75",
    levels: Annotated[str, typer.Option(help="How many proposals a step drafts.")] = "3,5,8,16",
    planner: Annotated[bool, typer.Option("--planner/--no-planner", help="Also lossless with the planner's schedules.")] = True,
    batches: Annotated[str, typer.Option(help="Samples decoded at once where seconds are measured.")] = "1,2,4,8",
    rounds: Annotated[int, typer.Option(help="Measured rounds, 3 or more.")] = 5,
    clock_tasks: Annotated[int, typer.Option(help="Tasks of a round.")] = 16,
    batch: Annotated[int, typer.Option(help="Samples decoded at once where accuracy is measured.")] = 64,
    threads: Annotated[int | None, typer.Option(help="Threads on a CPU; by default as many as torch has.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens per sample.")] = 256,
    seed: Annotated[int, typer.Option(help="Another one draws other held-out tasks.")] = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="PATH", help="Write the report there, a plot beside.")] = None,
) -> None:
    """Measure what ways to decode cost and what they are worth: accuracy against tokens, forwards and seconds.

    Accuracy is pass@k and majority@k on held-out tasks. Seconds are measured interleaved, every way in turn.

    \b
    Example:
      blockroll tradeoff tiny-reasoner --json tradeoff.json
      blockroll tradeoff tiny-reasoner --samplers lossless --levels 3 --batches 1,8 --json quick.json
    """
    from ..rollout.evaluation.tradeoff import TradeoffOptions, table
    from ..rollout.evaluation.tradeoff import tradeoff as measure
    from ..rollout.evaluation.tradeoff_plot import conclusion

    options = TradeoffOptions(
        tasks=tasks, samples=samples, temperature=temperature, samplers=tuple(words(samplers)),  # type: ignore[arg-type]
        mix_weights=numbers("mix_weights", mix_weights), level_counts=integers("levels", levels), planner=planner,
        batches=integers("batches", batches), rounds=rounds, clock_tasks=clock_tasks, batch=batch, threads=threads,
        max_tokens=max_tokens, seed=seed, device=device, dtype=dtype,
    )  # fmt: skip
    report = measure(one_policy(policy, named), options, json_path=json)
    print("\n".join([conclusion(report), *table(report)]))


def _service(address: str, keys: Path | None):
    """How `sample_file` reaches a service."""
    from contextlib import contextmanager

    from ..trainer_bridge.client import connect
    from ..trainer_bridge.client.sample_source import ServiceSource

    @contextmanager
    def source(tokenizer, positions):
        with connect(address, keys=keys) as client:
            yield ServiceSource(client, tokenizer, positions)

    return source
