"""`blockroll ablate`: what each part of a conversion recipe is worth, from one parent. The file sets each variant's budget.

Invariants:
- A cell is a (variant, seed): the base stage with the variant's changes, trained from the parent and decoded by the engine. Its
  directory is named after everything that makes it; a finished cell is not run again, a changed one is another cell.
- Within a seed, all cells see the same documents in the same order and answer the same held-out tasks with the same seeds.
- Cells do not know each other: with several workers they run in several processes, and come out the same.
- The table and the plot are made from the JSON's rows alone.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ...errors import InvalidInput
from ...files import whole_file, write_atomic, write_json
from ...model.checkpoint import load_policy, resolve
from ...model.conversion.config import ConversionConfig, Data, Stage
from ...model.conversion.train import run as run_stages
from ...model.tasks import make_tasks
from ...settings import Config, load_yaml, parse
from ..evaluation import evaluate, evaluate_ar_loss
from ..machine import describe, one_thread
from ..schedule import Schedule
from ..types import SamplerName

WAYS: tuple[tuple[SamplerName, float], ...] = (("lossless", 1.0), ("lossless", 0.3), ("mixed", 1.0), ("mixed", 0.3))
"""(sampler, temperature) each cell is decoded with."""


class Decoding(Config):
    """How the cells are decoded."""

    tasks: int = Field(200, ge=1, description="held-out tasks, one sample each")
    seed: int = Field(0, ge=0, description="of the tasks and of the samples")
    levels: tuple[int, ...] = Field((0, 4, 8), description="acceptance lengths a fused step proposes for")
    batch: int = Field(16, ge=1, description="samples decoded at once; tokens per forward do not depend on it")
    mix_weight: float = Field(0.5, ge=0, le=1, description="weight of p's logits for `mixed`")
    max_tokens: int = Field(256, ge=1, description="most tokens per sample")


class AblationConfig(Config):
    """One run of `blockroll ablate`."""

    output: str = Field(description="directory of the cells")
    parent: str = Field(description="AR policy every cell starts from: a name or directory")
    data: Data = Data()
    block_size: int = Field(16, ge=2, le=64)
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="of documents, blocks and new weights")
    stage: dict[str, Any] = Field(description="the base recipe, a stage of `blockroll convert`")
    variants: dict[str, dict[str, Any]] = Field(min_length=1, description="name -> fields that differ from the base; the "
                                                "first variant is what the others are compared with")
    decoding: Decoding = Decoding()

    @model_validator(mode="after")
    def _distinct(self) -> AblationConfig:
        if len(set(self.seeds)) != len(self.seeds):
            raise InvalidInput("seeds", f"{list(self.seeds)} holds one twice", "give each once")
        return self


class Cell(Config):
    """One variant with one seed."""

    variant: str
    parent: str
    data: Data
    block_size: int
    seed: int
    stage: Stage
    decoding: Decoding

    def directory(self, output: str) -> Path:
        """Where the cell's policy and figures are kept."""
        # What is left at its default does not count, so a field added to the recipe's language changes no name.
        recipe = json.dumps(self.model_dump(mode="json", exclude={"variant"}, exclude_defaults=True), sort_keys=True).encode()
        digest = hashlib.blake2b(recipe, digest_size=5).hexdigest()
        return Path(output) / f"{self.variant.replace(' ', '-').replace('/', '-')}-{self.seed}-{digest}"


def ablate(
    config_path: str | os.PathLike[str], workers: int = 1, on_cell: Callable[[dict[str, Any]], None] | None = None
) -> Path:
    """Runs the cells a file asks for and writes their JSON, Markdown table and plot beside the file, under its name.

    Args:
        workers: processes that run cells.
        on_cell: called with the figures of each cell that was run.

    Returns:
        The JSON's path. Its keys: `parent` (AR loss, pass@1), `cells` (one row each), `machine`, `config`.

    Raises:
        ConfigError: the file, or a variant of it, is not what it should be.
        CheckpointError: the parent cannot be read.
        StorageError: something could not be written whole.
    """
    if workers < 1:
        raise InvalidInput("workers", f"{workers} is less than 1", "use at least one process")
    path = Path(config_path)
    config = load_yaml(path, AblationConfig)
    cells = list(cells_of(config, os.fspath(path)))
    resolve(config.parent)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with one_thread(), Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("cells", total=len(cells))
        for row, fresh in _run_all(cells, config.output, workers):
            progress.update(task, advance=1, description=f"{row['variant']}, seed {row['seed']}")
            if fresh:
                # A long run: show what there is after every cell.
                _write(path, config, _finished(cells, config.output))
                if on_cell is not None:
                    on_cell(row)
    _write(path, config, _finished(cells, config.output))
    return path.with_suffix(".json")


def cells_of(config: AblationConfig, name: str) -> Iterator[Cell]:
    """Every variant with every seed, seed by seed; `name` is what errors call the file."""
    stages = {variant: parse(_merged(config.stage, changes), Stage, f"{name}, variant {variant!r}")
              for variant, changes in config.variants.items()}
    for seed in config.seeds:
        data = config.data.model_copy(update={"seed": config.data.seed + seed})
        for variant, stage in stages.items():
            yield Cell(variant=variant, parent=config.parent, data=data, block_size=config.block_size, seed=seed,
                       stage=stage, decoding=config.decoding)


def run_cell(cell: Cell, output: str) -> dict[str, Any]:
    """Trains and measures one cell, or goes on with it; returns its figures, which are kept beside its policy."""
    directory = cell.directory(output)
    conversion = ConversionConfig(
        output=str(directory / "policy"), parent=cell.parent, data=cell.data, block_size=cell.block_size,
        stages=(cell.stage,), seed=cell.seed, save_dtype="float32",
    )
    last: dict[str, Any] = {}
    policy = run_stages(conversion, last.update)
    assert policy is not None  # only the other processes of a group are left without one
    decoding = cell.decoding
    tasks = make_tasks("heldout", decoding.tasks, decoding.seed, cell.data.families or None)
    ways = []
    for sampler, temperature in WAYS:
        result = evaluate(
            policy, tasks, sampler=sampler, schedule=Schedule("fused", levels=decoding.levels), temperature=temperature,
            mix_weight=decoding.mix_weight, max_tokens=decoding.max_tokens, batch=decoding.batch, seed=decoding.seed,
        )
        ways.append(asdict(result))
    row = dict(
        variant=cell.variant, seed=cell.seed, stage=cell.stage.model_dump(mode="json"),
        ar_loss=evaluate_ar_loss(policy, tasks), overlap=last.get("overlap"), ways=ways,
    )
    write_json(directory / "figures.json", row)
    return row


def _run_all(cells: Sequence[Cell], output: str, workers: int) -> Iterator[tuple[dict[str, Any], bool]]:
    """(figures, whether they were made just now) of each cell, in the order they are ready."""
    missing = []
    for cell in cells:
        figures = _figures(cell, output)
        if figures is None:
            missing.append(cell)
        else:
            yield figures, False
    if workers == 1:
        for cell in missing:
            yield run_cell(cell, output), True
        return
    # Fresh interpreters: threads of torch do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(run_cell, cell, output) for cell in missing]
        try:
            for future in as_completed(futures):
                yield future.result(), True
        finally:
            for future in futures:
                future.cancel()


def _figures(cell: Cell, output: str) -> dict[str, Any] | None:
    path = cell.directory(output) / "figures.json"
    # The name of a variant is not part of what makes a cell.
    return {**json.loads(path.read_text()), "variant": cell.variant} if path.is_file() else None


def _finished(cells: Sequence[Cell], output: str) -> list[dict[str, Any]]:
    return [figures for cell in cells if (figures := _figures(cell, output)) is not None]


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    return {**base, **{key: _merged(base.get(key) or {}, value) if isinstance(value, Mapping) else value
                       for key, value in changes.items()}}  # fmt: skip


def _parent(config: AblationConfig) -> dict[str, Any]:
    """What the parent says of the same tasks."""
    path = Path(config.output) / f"parent-{hashlib.blake2b(repr(config.decoding).encode(), digest_size=5).hexdigest()}.json"
    if path.is_file():
        return json.loads(path.read_text())
    parent, decoding = load_policy(config.parent), config.decoding
    tasks = make_tasks("heldout", decoding.tasks, decoding.seed, config.data.families or None)
    result = evaluate(parent, tasks, sampler="ar", schedule=Schedule("ar"), max_tokens=decoding.max_tokens,
                      batch=decoding.batch, seed=decoding.seed)
    figures = dict(ar_loss=evaluate_ar_loss(parent, tasks), pass_at_1=result.pass_at_1,
                   standard_error=result.standard_error, answer_tokens=result.answer_tokens)
    write_json(path, figures)
    return figures


def _write(path: Path, config: AblationConfig, rows: list[dict[str, Any]]) -> None:
    report = dict(config=config.model_dump(mode="json"), parent=_parent(config), cells=rows, machine=describe())
    write_json(path.with_suffix(".json"), report)
    write_atomic(path.with_suffix(".md"), table(report).encode())
    plot(report, path.with_suffix(".png"))


def _values(report: Mapping[str, Any], variant: str, pick: Callable[[dict[str, Any]], float]) -> np.ndarray:
    return np.array([pick(row) for row in report["cells"] if row["variant"] == variant])


def _way(row: Mapping[str, Any], sampler: str, temperature: float) -> dict[str, Any]:
    return next(way for way in row["ways"] if (way["sampler"], way["temperature"]) == (sampler, temperature))


def _acceptance(report: Mapping[str, Any], variant: str) -> list[float]:
    """Conditional acceptance of the k-th draft, lossless at temperature 1, mean over seeds; as far as all seeds reach."""
    per_seed = [_way(row, "lossless", 1.0)["acceptance"] for row in report["cells"] if row["variant"] == variant]
    return [float(np.mean(values)) for values in zip(*per_seed, strict=False)]


def _variants(report: Mapping[str, Any]) -> list[str]:
    done = {row["variant"] for row in report["cells"]}
    return [variant for variant in report["config"]["variants"] if variant in done]


def table(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    config, parent, variants = report["config"], report["parent"], _variants(report)
    decoding, machine, stage = config["decoding"], report["machine"], config["stage"]
    head = " | ".join(f"TPF {sampler} T={temperature:g}" for sampler, temperature in WAYS)
    lines = [
        "# Ablation of the conversion",
        "",
        f"Every policy starts from the same AR parent (AR loss {parent['ar_loss']:.4f} nats/token, pass@1"
        f" {parent['pass_at_1']:.3f} ± {parent['standard_error']:.3f}, {parent['answer_tokens']:.1f} tokens per answer) and"
        " is trained on as many rows as its line says, clean rows and mask rows together; then"
        f" {decoding['tasks']} held-out tasks, one sample each, at most {decoding['max_tokens']} tokens, schedule fused"
        f" {{{','.join(map(str, decoding['levels']))}}}, block size {config['block_size']}, mixed weight"
        f" {decoding['mix_weight']:g}, seed {decoding['seed']}, batch {decoding['batch']}, float32.",
        f"Mean ± standard deviation over seeds {', '.join(map(str, config['seeds']))}. TPF: committed tokens per forward, prefill"
        f" left out. {machine['processor']}, torch {machine['versions']['torch']}, {machine['date']}.",
        "",
        f"| variant | seeds | rows | {head} | ratio | AR loss | to parent | pass@1 |",
        "|---|---:|---:|" + "---:|" * (len(WAYS) + 4),
    ]
    base = _values(report, variants[0], lambda row: _way(row, "lossless", 1.0)["tokens_per_forward"]).mean() \
        if variants else 1.0  # fmt: skip
    for variant in variants:
        tpf = [_values(report, variant, lambda row, way=way: _way(row, *way)["tokens_per_forward"]) for way in WAYS]  # type: ignore[misc]
        ar = _values(report, variant, lambda row: row["ar_loss"])
        right = _values(report, variant, lambda row: _way(row, "lossless", 1.0)["pass_at_1"])
        changed = {**stage, **config["variants"][variant]}
        rows = changed["tokens"] * (1 + changed.get("masked_copies", 1))
        cells = " | ".join(f"{x.mean():.2f} ± {x.std():.2f}" for x in tpf)
        lines.append(
            f"| {variant} | {len(ar)} | {rows / 1e3:,.0f}k | {cells} | {tpf[0].mean() / base:.2f} | {ar.mean():.4f} |"
            f" {100 * (ar.mean() / parent['ar_loss'] - 1):+.1f} % | {right.mean():.3f} ± {right.std():.3f} |"
        )
    lines += ["", f"Ratio: of lossless TPF at T=1 to `{variants[0] if variants else ''}`. pass@1: lossless, T=1.", "",
              "What each variant changes:", ""]
    lines += [f"- {variant}: `{json.dumps(config['variants'][variant])}`" for variant in variants]
    lines += ["", f"Base: `{json.dumps(stage)}`", "",
              "Acceptance of the k-th draft given that all before it were accepted, lossless, T=1:", ""]
    acceptance = {variant: _acceptance(report, variant) for variant in variants}
    most = max(map(len, acceptance.values()), default=0)
    lines += ["| variant | " + " | ".join(str(k + 1) for k in range(most)) + " |", "|---|" + "---:|" * most]
    for variant, values in acceptance.items():
        filled = [f"{value:.2f}" for value in values] + [""] * (most - len(values))
        lines.append(f"| {variant} | " + " | ".join(filled) + " |")
    return "\n".join(lines) + "\n"


def plot(report: Mapping[str, Any], path: Path, format: Literal["png"] = "png") -> None:
    """Tokens per forward by variant, one dot per seed, and acceptance by slot."""
    from matplotlib.figure import Figure

    variants = _variants(report)
    figure = Figure(figsize=(13, 1.5 + 0.45 * max(len(variants), 6)), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (sampler, temperature), marker in zip(WAYS, "osD^", strict=True):
        for place, variant in enumerate(variants):
            values = _values(
                report, variant, lambda row, way=(sampler, temperature): _way(row, *way)["tokens_per_forward"]  # type: ignore[misc]
            )
            colour = f"C{[way[0] for way in WAYS].index(sampler)}"
            left.plot(values, [place] * len(values), marker, color=colour, alpha=0.8, markersize=5,
                      fillstyle="full" if temperature == 1 else "none",
                      label=f"{sampler}, T={temperature:g}" if not place else None)
    left.set(yticks=range(len(variants)), yticklabels=variants, xlabel="tokens per forward")
    left.invert_yaxis()
    left.grid(axis="x", alpha=0.3)
    left.legend(fontsize=8)
    for place, variant in enumerate(variants):
        accepted = _acceptance(report, variant)
        right.plot(range(1, len(accepted) + 1), accepted, marker=".", label=variant, color=f"C{place % 10}",
                   linestyle="-" if place < 10 else "--")
    right.set(xlabel="draft", ylabel="accepted, given all before it were", ylim=(0, 1))
    right.grid(alpha=0.3)
    right.legend(fontsize=7)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format=format, dpi=120)
