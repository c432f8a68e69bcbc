"""`blockroll eval`: everything that is measured of a policy, as one JSON.

Invariants:
- Policy and parent answer the same tasks with the same seeds; no task is one that the policy's recipe trained on.
- Every figure is of `Evaluation`s (`ways` in the JSON), of the AR loss or of `places`: nothing is measured elsewhere, and the
  card and the plot say nothing that is not in the JSON.
- `ar` is always measured: what it samples is what the entropy of p and the acceptance by slot are taken from.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import InvalidInput
from ...files import check_output, write_atomic, write_json
from ...model.checkpoint import load_policy, resolve
from ...model.conversion.config import ConversionConfig
from ...model.conversion.data import Document
from ...model.device import placement
from ...model.policy import Policy
from ...model.tasks.own import OwnTasks
from ...model.tasks.own_config import TaskSource
from ...model.tasks.task_set import AnyTask, ReasoningGym, TaskSet
from ..machine import describe
from ..progress import Meter
from ..types import Trajectory
from .card import card, figures_as_markdown
from .decoding import Evaluation, ar_loss, evaluate, tokenizer_of
from .documents import FileSource, document_loss, read_documents
from .options import Options, Way
from .places import acceptance_at_places
from .plots import plot
from .training import Disjointness, check_disjoint, heldout_tasks, recipes_of

_BATCH_1_TASKS = 16


@dataclass(frozen=True)
class Questions:
    """The tasks that are answered, what they came from, and the reward from which an answer is right."""

    tasks: Sequence[AnyTask]
    source: TaskSet
    right: float = 1.0


def evaluate_policy(
    policy_name: str | os.PathLike[str],
    options: Options | None = None,
    *,
    source: TaskSource | None = None,
    documents: FileSource | None = None,
    parent_name: str | os.PathLike[str] | None = None,
    json_path: str | os.PathLike[str] | None = None,
    card_path: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Measures a policy.

    Args:
        source: tasks of one's own, in place of reasoning-gym's.
        documents: files whose AR loss is measured as well; of `options.documents` of their records.
        parent_name: the AR policy it was converted from, decoded with `ar` beside it.
        json_path: where the figures go, with a plot beside them (`.png`).
        card_path: where the model card goes, Markdown.

    Returns:
        The figures, as in the JSON. Keys, among others: `tokens_per_forward` (by sampler and temperature), `pass_at` (by
        sampler, or `parent`, and k), `ar_loss` (nats per token of the tasks' own completions), `ar_entropy` (of p, nats per
        token, by temperature), `acceptance_by_slot` (by block size, from slot 1 on: see `places`), `acceptance_by_kind` (of
        token), `answer_tokens`, `tasks`, `samples`, `seed`, `disjoint`, `batch_1` (the same tasks decoded alone),
        `standard_error` (of the estimates, under the same keys), `ways` (every `Evaluation`), `machine`, `seconds`. With
        `documents`: `document_loss` (nats per token) and `documents` (how many). With a `source` of one's own: `reward` (mean, by
        sampler and temperature), and `ar_loss` where the source names reference answers.

    Raises:
        InvalidInput: a policy without a tokenizer, or an option out of range.
        DataError: a task is among what the policy was trained on.
        CheckpointError: the policy or its parent cannot be read.
        StorageError: a file could not be written whole.
    """
    outputs = [] if json_path is None else [Path(json_path), Path(json_path).with_suffix(".png")]
    outputs += [] if card_path is None else [Path(card_path)]
    for i, path in enumerate(outputs):
        check_output(path, *outputs[:i])  # now rather than after an hour of decoding
    options, began = options or Options(), time.perf_counter()
    directory = resolve(policy_name)
    dtype, device = placement(options.device, options.dtype)
    policy = load_policy(directory, dtype, device)
    parent = None if parent_name is None else _load_parent(parent_name, policy)
    read = [] if documents is None else read_documents(documents, policy, options.documents, options.seed)
    recipes, not_compared = recipes_of(directory)
    with closing(ReasoningGym() if source is None else OwnTasks(source, policy, where="source")) as task_set:
        if source is None:
            questions = Questions(heldout_tasks(recipes, options.tasks, options.seed), task_set)
        else:
            questions = Questions(task_set.heldout(options.tasks, options.seed), task_set, source.right)
        tasks = questions.tasks
        disjoint = _check_disjoint(recipes, not_compared, questions, tokenizer_of(policy, tasks))
        figures = _measured(directory, policy, parent, parent_name, questions, read, options, disjoint, dtype)
    figures |= {"machine": describe(device), "seconds": round(time.perf_counter() - began, 1)}
    if json_path is not None:
        write_json(json_path, figures)
        plot(figures, Path(json_path).with_suffix(".png"))
    if card_path is not None:
        picture = None if json_path is None else os.path.relpath(Path(json_path).with_suffix(".png"), Path(card_path).parent)
        write_atomic(card_path, card(policy, figures, directory, picture).encode())
    return figures


def _measured(
    directory: Path, policy: Policy, parent: Policy | None, parent_name: str | os.PathLike[str] | None, questions: Questions,
    documents: list[Document], options: Options, disjoint: Disjointness, dtype: str,
) -> dict[str, Any]:
    tasks = questions.tasks
    figures: dict[str, Any] = dict(
        policy=directory.name, parent=None if parent_name is None else resolve(parent_name).name, split="heldout",
        source="reasoning-gym" if isinstance(questions.source, ReasoningGym) else "own",
        families=sorted({task.family for task in tasks}), tasks=len(tasks), samples=options.samples, k=list(options.groups),
        seed=options.seed, temperatures=list(dict.fromkeys(options.temperatures)), max_tokens=options.max_tokens,
        batch=options.batch, levels=list(options.levels), block_size=policy.block_size,
        draft_temperature=policy.draft_temperature, dtype=dtype,
        disjoint={**asdict(disjoint), "overlap": 0},
    )  # fmt: skip
    estimates = _measure_all(policy, parent, questions, options, figures)
    if documents:
        figures["documents"] = len(documents)
        estimates["document_loss"] = document_loss(policy, documents)
        if parent is not None:
            estimates["parent_document_loss"] = document_loss(parent, documents, "documents, parent")
    figures |= {name: _part(table, 0) for name, table in estimates.items()}
    figures["standard_error"] = {name: _part(table, 1) for name, table in estimates.items()}
    return figures


def evaluate_and_show(policy_name: str | os.PathLike[str], options: Options, everything: bool, **places: Any) -> None:
    """`evaluate_policy`, and its figures on the standard output: `everything`, or those that are asked for most."""
    print("\n".join(figures_as_markdown(evaluate_policy(policy_name, options, **places), everything)))


def _load_parent(name: str | os.PathLike[str], policy: Policy) -> Policy:
    parent = load_policy(name, str(policy.dtype).removeprefix("torch."), policy.device)
    if parent.config.vocab_size != policy.config.vocab_size:
        raise InvalidInput("parent", f"its vocabulary has {parent.config.vocab_size} tokens and the policy's"
                           f" {policy.config.vocab_size}", "name the policy that was converted")  # fmt: skip
    parent.tokenizer = parent.tokenizer or policy.tokenizer
    return parent


def _check_disjoint(
    recipes: Sequence[ConversionConfig], not_compared: Sequence[str], questions: Questions, tokenizer: Any
) -> Disjointness:
    total = sum(stage.tokens for recipe in recipes for stage in recipe.runs)
    with Meter("tokens of the training", total) as meter:
        return check_disjoint(recipes, not_compared, questions.tasks, tokenizer,
                              lambda tokens: meter.advance(tokens, 0, tokens), questions.source)


def _measure(
    policy: Policy, questions: Questions, way: Way, options: Options, whose: str = "", batch: int | None = None
) -> tuple[Evaluation, list[Trajectory]]:
    made: list[Trajectory] = []
    title = " ".join(filter(None, [whose, way.name, f"T={way.temperature:g}", f"B={way.block_size}" if way.block_size else "",
                                   f"draft T={way.draft_temperature:g}" if way.draft_temperature else ""]))
    with Meter(title, len(questions.tasks) * way.samples) as meter:

        def finished(sample: Trajectory) -> None:
            made.append(sample)
            meter.advance(len(sample.tokens), sample.forwards)

        result = evaluate(
            policy, questions.tasks, source=questions.source, right=questions.right, sampler=way.sampler,
            schedule=way.schedule, temperature=way.temperature, mix_weight=way.weight,
            samples=way.samples, k=[k for k in options.groups if k <= way.samples] or [1], max_tokens=options.max_tokens,
            batch=batch or options.batch, seed=options.seed, block_size=way.block_size,
            draft_temperature=way.draft_temperature, on_finish=finished,
        )  # fmt: skip
    return result, made


def _measure_all(
    policy: Policy, parent: Policy | None, questions: Questions, options: Options, figures: dict[str, Any]
) -> dict[str, Any]:
    """Adds to `figures` what has no standard error, and returns tables of (value, standard error)."""
    first = options.temperatures[0]
    measured: list[tuple[Way, Evaluation]] = []
    samples: dict[Way, list[Trajectory]] = {}  # of the first temperature, the first of each task
    for way in options.ways():
        result, made = _measure(policy, questions, way, options)
        measured.append((way, result))
        if way.temperature == first:
            samples[way] = [sample for sample in made if sample.sample == 0]
    at_first = {way.name: result for way, result in measured if way.temperature == first}
    figures["ways"] = [{"policy": "policy", "name": way.name, **asdict(result)} for way, result in measured]
    tasks, own = questions.tasks, not isinstance(questions.source, ReasoningGym)
    worked = all(task.completion for task in tasks)
    estimates: dict[str, Any] = {"ar_loss": ar_loss(policy, tasks, questions.source)} if worked else {}
    if parent is not None:
        result, _ = _measure(parent, questions, next(iter(samples)), options, "parent")
        at_first = {"parent": result, **at_first}
        figures["ways"].insert(0, {"policy": "parent", "name": "ar", **asdict(result)})
        if worked:
            estimates["parent_ar_loss"] = ar_loss(parent, tasks, questions.source)
    estimates |= dict(
        ar_entropy={str(w.temperature): (r.surprise, r.surprise_standard_error) for w, r in measured if w.sampler == "ar"},
        tokens_per_forward=_by_temperature(measured, "tokens_per_forward"),
        pass_at={name: {str(k): (r.pass_at[k], r.pass_at_standard_error[k]) for k in options.groups}
                 for name, r in at_first.items()},
        answer_tokens={name: (r.answer_tokens, r.answer_tokens_standard_error) for name, r in at_first.items()},
    )  # fmt: skip
    if own:
        estimates["reward"] = _by_temperature(measured, "reward")
        figures["unrewarded"] = sum(result.unrewarded for _, result in measured)
    drafting = sorted((way for way in samples if way.sampler != "ar"), key=lambda way: way.sampler != "lossless")
    if drafting:
        way = drafting[0]
        figures |= dict(
            drafting=way.name, acceptance_by_kind=at_first[way.name].acceptance_by_kind,
            batch_1=_check_batch_1(policy, questions, way, options, samples[way]),
        )  # fmt: skip
        sizes = sorted(set(options.block_sizes))
        compared = _compare_block_sizes(policy, questions, way, options, at_first[way.name])
        figures["ways"] += [{"policy": "policy", "name": way.name, **asdict(result)} for result in compared
                            if result.block_size != policy.block_size]  # fmt: skip
        slots = acceptance_at_places(policy, next(iter(samples.values())), sizes, first, seed=options.seed)
        estimates |= dict(
            tokens_per_forward_by_block_size={
                str(r.block_size): (r.tokens_per_forward, r.tokens_per_forward_standard_error) for r in compared},
            acceptance_by_slot={str(size): row for size, row in slots.items()},
        )  # fmt: skip
        if options.draft_temperatures:
            estimates["tokens_per_forward_by_draft_temperature"] = _compare_draft_temperatures(policy, questions, way, options)
    return estimates


def _compare_block_sizes(
    policy: Policy, questions: Questions, way: Way, options: Options, at_own: Evaluation
) -> list[Evaluation]:
    """The way at each block size; what was measured at the policy's own is not decoded again."""
    return [at_own if size == policy.block_size else
            _measure(policy, questions, replace(way, samples=1, block_size=size), options)[0]
            for size in sorted(set(options.block_sizes))]  # fmt: skip


def _compare_draft_temperatures(
    policy: Policy, questions: Questions, way: Way, options: Options
) -> dict[str, tuple[float, float]]:
    """Tokens per forward of the way at each temperature of the drafts, with the standard error."""
    found = {}
    for temperature in sorted(set(options.draft_temperatures)):
        result, _ = _measure(policy, questions, replace(way, samples=1, draft_temperature=temperature), options)
        found[f"{temperature:g}"] = result.tokens_per_forward, result.tokens_per_forward_standard_error
    return found


def _check_batch_1(
    policy: Policy, questions: Questions, way: Way, options: Options, samples: Sequence[Trajectory]
) -> dict[str, Any]:
    """Whether samples decoded alone are those decoded together, and took as many forwards."""
    some = questions.tasks[:_BATCH_1_TASKS]
    together = {sample.request_id: sample for sample in samples}
    result, alone = _measure(policy, replace(questions, tasks=some), replace(way, samples=1), options, "alone:", batch=1)
    others = [together[task.id] for task in some]
    return dict(
        tasks=len(some), tokens_per_forward=result.tokens_per_forward,
        tokens_per_forward_in_batch=sum(len(s.tokens) for s in others) / sum(s.forwards for s in others),
        equal_samples=sum(sample.tokens == together[sample.request_id].tokens for sample in alone),
    )  # fmt: skip


def _by_temperature(measured: Sequence[tuple[Way, Evaluation]], figure: str) -> dict[str, dict[str, tuple[float, float]]]:
    """An estimate of every way, by name and temperature."""
    table: dict[str, dict[str, tuple[float, float]]] = {}
    for way, result in measured:
        estimate = getattr(result, figure), getattr(result, f"{figure}_standard_error")
        table.setdefault(way.name, {})[str(way.temperature)] = estimate
    return table


def _part(node: Any, index: int) -> Any:
    """Of every estimate in a table, the value (0) or the standard error (1)."""
    if isinstance(node, dict):
        return {key: _part(value, index) for key, value in node.items()}
    if isinstance(node, list):
        return [_part(value, index) for value in node]
    return node[index] if isinstance(node, tuple) else node
