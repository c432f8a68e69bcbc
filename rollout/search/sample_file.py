"""`blockroll sample`: searches for the questions of a file, of the command line or of held-out tasks, one line of JSON each.

Invariants:
- Every question is checked before anything is sampled. Output lines come in the questions' order, and an output file appears
  under its name only when all of them are in it.
- Where a service samples, the policy's weights are not loaded: only its configuration and tokenizer are read.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from ...errors import DataError, InvalidInput
from ...files import check_output, whole_file
from ...inputs import open_input, read_lines, unreadable
from ...model.arguments import short
from ...model.checkpoint import load_policy, resolve
from ...model.config import read_config
from ...model.device import placement
from ...model.tasks import make_tasks, question, score
from ...model.tokenizer import encode_prompt
from ...model.tokenizer_files import read_tokenizer
from ..engine import Engine, EngineConfig
from ..input_lines import LINE_BYTES, PROMPT_BYTES, InputFile, Line
from ..offline import pool_size
from ..params import SamplingParams
from ..progress import Meter
from ..schedule import Schedule
from .candidates import Question, SearchResult
from .config import SearchConfig
from .context import check_question
from .driver import functions_of, run_searches
from .engine_source import EngineSource
from .source import SampleSource

MAX_TASKS = 100_000
"""Held-out tasks: they are drawn before the first is sampled."""
MAX_BATCH = 65_536
Connect = Callable[[Any, int], AbstractContextManager[SampleSource]]
"""(tokenizer, longest sequence) -> a service as a source."""


@dataclass(frozen=True)
class PolicyText:
    """A policy's configuration and tokenizer, without its weights."""

    config: Any
    tokenizer: Any


@dataclass(frozen=True)
class Prompts:
    """Where questions come from: exactly one of these.

    Attributes:
        input: a file. One named *.jsonl or *.json holds lines {"id", "prompt" or "prompt_tokens"}; any other a prompt per line.
        text: one prompt.
        tasks: how many held-out tasks, drawn with the search's seed; the summary then says how many were answered rightly.
        questions: prompts are questions for the shipped policies, such as `47 + 85`, and get their form.
    """

    input: str | os.PathLike[str] | None = None
    text: str | None = None
    tasks: int | None = None
    questions: bool = False

    def __post_init__(self) -> None:
        given = [name for name in ("input", "text", "tasks") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidInput("input", f"{', '.join(given) or 'nothing'} given", "give one of --input, --prompt and --tasks")
        if self.tasks is not None and not 1 <= self.tasks <= MAX_TASKS:
            raise InvalidInput("tasks", f"{self.tasks} is outside 1..{MAX_TASKS}", "use a number in that range")


def sample_file(
    policy_name: str | os.PathLike[str],
    prompts: Prompts,
    config: SearchConfig,
    params: SamplingParams,
    *,
    output: str | os.PathLike[str] | None = None,
    connect: Connect | None = None,
    schedule: Schedule | None = None,
    batch: int = 32,
    device: str = "auto",
    dtype: str | None = None,
    candidates: bool = False,
) -> str:
    """Searches for each question; returns the summary, one line.

    Args:
        output: JSONL, `SearchResult.as_dict` per line, with `right` for tasks; None for the standard output.
        connect: makes a service the source; None for an engine in this process.
        schedule, device, dtype: of that engine.
        batch: samples decoded at once, or outstanding at the service, about.
        candidates: write every candidate's text, answer, log-probability and score too.

    Raises:
        InvalidInput: an option or a question cannot be used. StorageError: the output cannot be written whole.
    """
    if not 1 <= batch <= MAX_BATCH:
        raise InvalidInput("batch", f"{batch} is outside 1..{MAX_BATCH}", "use a number in that range")
    if output is not None:
        check_output(output, *([] if prompts.input is None else [prompts.input]))
    functions_of(config, params)
    read: Any
    if connect is None:
        read = load_policy(policy_name, *placement(device, dtype))
    else:
        directory = resolve(policy_name)
        read = PolicyText(read_config(directory), read_tokenizer(directory))
    if read.tokenizer is None:
        raise InvalidInput("policy", f"{short(str(policy_name))} has no tokenizer",
                           "searches read texts; save it beside the weights")  # fmt: skip
    with _reader(prompts, config, read) as questions:
        count = longest = 0
        names = set[str]()
        for each in questions():
            check_question(each, config)
            if each.id in names:
                raise InvalidInput("id", f"{short(each.id)} names two questions", "give each question an id of its own")
            names.add(each.id)
            count, longest = count + 1, max(longest, len(each.prompt_tokens))
        positions = read.config.max_position_embeddings
        if connect is None:
            settings = EngineConfig(schedule=schedule or Schedule(), max_batch=batch)
            most = positions if config.method in ("beam", "markovian_rsa", "budget_forcing") else longest + params.max_tokens
            engine = Engine(read, replace(settings, pages=pool_size(most, read, settings)))
            source: AbstractContextManager[SampleSource] = nullcontext(EngineSource(engine))
        else:
            source = connect(read.tokenizer, positions)
        with source as samples, _lines(output) as out:
            judged = prompts.tasks is not None
            return _write(samples, islice(questions(), count), count, config, params, batch, candidates, judged, out)


def _write(
    source: SampleSource, questions: Iterable[Question], count: int, config: SearchConfig, params: SamplingParams, batch: int,
    candidates: bool, judged: bool, out: TextIO,
) -> str:  # fmt: skip
    """Runs the searches and writes their lines; returns the summary."""
    order: list[Question] = []

    def noted() -> Iterator[Question]:
        for each in questions:
            order.append(each)
            yield each

    waiting: dict[str, SearchResult] = {}
    written = right = answered = 0
    spent = {"samples": 0, "tokens": 0, "forwards": 0, "seconds": 0.0}
    with Meter(f"sample {config.method}", count) as meter:
        for result in run_searches(source, noted(), config, params, ahead=batch):
            meter.advance(result.spent.tokens, result.spent.forwards)
            waiting[result.id] = result
            while written < len(order) and (done := waiting.pop(order[written].id, None)) is not None:
                asked = order[written]
                line = done.as_dict()
                if judged and asked.verifier is not None:
                    line["right"] = done.answer is not None and asked.verifier(done.text or "") == 1.0
                    right += line["right"]
                if candidates:
                    line["candidates"] = [
                        {"text": c.text, "answer": c.answer, "tokens": c.count, "logprob": c.logprob, "score": c.score}
                        for c in done.verdict.candidates
                    ]  # fmt: skip
                out.write(json.dumps(line, allow_nan=False) + "\n")
                answered += done.answer is not None
                for name in spent:
                    spent[name] += getattr(done.spent, name)
                written += 1
    each = {name: value / count for name, value in spent.items()}
    judgement = f"{right / count:.3f} right, " if judged else ""
    return (f"{config.method}: {count} questions, {judgement}{answered} answered; per question {each['samples']:.1f} samples, "
            f"{each['tokens']:,.0f} tokens, {each['forwards']:,.0f} forwards, {each['seconds']:.2f} s")  # fmt: skip


@contextmanager
def _reader(prompts: Prompts, config: SearchConfig, policy: Any) -> Iterator[Callable[[], Iterator[Question]]]:
    """What yields the questions, each time it is called, from the first on."""
    if prompts.input is not None and Path(prompts.input).suffix in (".jsonl", ".json"):
        with InputFile(prompts.input, policy, PROMPT_BYTES) as file:
            yield lambda: (_from_line(line, policy, prompts.questions) for line in file)
        return
    if prompts.tasks is not None:
        tasks = make_tasks("heldout", prompts.tasks, config.seed)
        asked = [Question(task.id, tuple(encode_prompt(policy.tokenizer, task.prompt)), task.prompt, partial(score, task))
                 for task in tasks]  # fmt: skip
        yield lambda: iter(asked)
        return
    if prompts.text is not None:
        texts = [("prompt", prompts.text)]
    else:
        assert prompts.input is not None
        texts = _texts(prompts.input, LINE_BYTES + PROMPT_BYTES * policy.config.max_position_embeddings)
    made = [_from_line(Line(place, {"id": str(i), "prompt": text}), policy, prompts.questions)
            for i, (place, text) in enumerate(texts)]  # fmt: skip
    yield lambda: iter(made)


def _from_line(line: Line, policy: Any, questions: bool) -> Question:
    if questions and isinstance(text := line.record.get("prompt"), str):
        line = Line(line.place, {**line.record, "prompt": question(text)})
    tokens = line.prompt(policy)
    text = line.record.get("prompt")
    return Question(str(line.name()), tokens, text if isinstance(text, str) else policy.tokenizer.decode(list(tokens)))


def _texts(path: str | os.PathLike[str], most: int) -> list[tuple[str, str]]:
    """(place, text) of every line of a text file that is not blank."""
    name = os.fspath(path)
    try:
        file = open_input(path, pipes=True)
    except OSError as error:
        raise unreadable(path, error) from error
    found = []
    with file:
        for number, raw in read_lines(file, name, most):
            try:
                text = raw.decode("utf-8-sig").strip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(f"{name} line {number}", f"not UTF-8 text ({error.reason})", "save the file as UTF-8") from error
            if text.strip():
                found.append((f"{name} line {number}", text))
    if not found:
        raise DataError(name, "holds no lines", "write one prompt per line")
    return found


@contextmanager
def _lines(output: str | os.PathLike[str] | None) -> Iterator[TextIO]:
    if output is None:
        yield sys.stdout
        return
    with whole_file(Path(output)) as temporary, open(temporary, "w", encoding="utf-8") as file:
        yield file

