"""`blockroll ablate`: trains variants of a conversion stage from one parent and compares them. The file sets each variant's
budget.

Invariants:
- A cell is a (variant, seed): the base stage with the variant's changes, trained from the parent and decoded by the engine. Its
  directory is named after everything that makes it; a finished cell is not run again, a changed one is another cell.
- Within a seed, all cells see the same documents in the same order and answer the same held-out tasks with the same seeds.
- Cells do not know each other: with several workers they run in several processes, and come out the same.
- The table and the plot are made from the JSON alone (`ablation_report`).
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator

from ...errors import InvalidInput
from ...files import check_directory, check_output, locked_directory, make_directory, write_atomic, write_json
from ...model.checkpoint import load_policy, resolve
from ...model.conversion.config import ConversionConfig, Data, DeviceName, DtypeName, Stage
from ...model.conversion.train import run as run_stages
from ...model.device import placement, resolved
from ...model.tasks import make_tasks
from ...seeds import MAX_SEED
from ...settings import Config, load_yaml, parse
from ..evaluation import evaluate, evaluate_ar_loss
from ..machine import describe, torch_threads
from ..progress import ItemMeter
from ..schedule import DEFAULT_LEVELS, Schedule
from .ablation_report import WAYS, plot, table

OUTPUTS = (".json", ".md", ".png")
"""What is written beside the configuration, under its name."""
MAX_WORKERS = 1024
"""Processes; more than any machine has cores for."""
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


class Decoding(Config):
    """How the cells are decoded."""

    tasks: int = Field(200, ge=1, le=100_000, description="held-out tasks, one sample each")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="of the tasks and of the samples")
    levels: tuple[int, ...] = Field(DEFAULT_LEVELS, description="acceptance lengths a fused step proposes for")
    batch: int = Field(16, ge=1, le=65_536, description="samples decoded at once; tokens per forward do not depend on it")
    mix_weight: float = Field(0.5, ge=0, le=1, description="weight of p's logits for `mixed`")
    max_tokens: int = Field(256, ge=1, le=2**31, description="most tokens per sample")
    dtype: DtypeName | None = Field(None, description="of the policies; none takes bfloat16 on a GPU and float32 on a CPU")

    @model_validator(mode="after")
    def _levels(self) -> Decoding:
        Schedule("fused", levels=self.levels)
        return self


class AblationConfig(Config):
    """One run of `blockroll ablate`."""

    output: str = Field(min_length=1, description="directory of the cells")
    parent: str = Field(description="AR policy every cell starts from: a name or directory")
    data: Data = Data()
    block_size: int = Field(16, ge=2, le=64)
    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1, description="of documents, blocks and new weights")
    stage: dict[str, Any] = Field(description="the base recipe, a stage of `blockroll convert`")
    variants: dict[Annotated[str, Field(min_length=1, max_length=100)], dict[str, Any]] = Field(
        min_length=1, description="name -> fields that differ from the base; the first is what the others are compared with"
    )
    decoding: Decoding = Decoding()
    device: DeviceName = Field("auto", description="where cells are trained and decoded: auto, cpu, cuda or cuda:N")

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
    device: str = "auto"

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
    if not 1 <= workers <= MAX_WORKERS:
        raise InvalidInput("workers", f"{workers} is outside 1..{MAX_WORKERS}", "use as many processes as there are cores")
    path = Path(config_path)
    for suffix in OUTPUTS:
        check_output(path.with_suffix(suffix), path)
    config = load_yaml(path, AblationConfig)
    cells = list(cells_of(config, os.fspath(path)))
    resolve(config.parent)
    check_directory(config.output)
    output = make_directory(config.output)
    with locked_directory(output), torch_threads(1), ItemMeter("cells", len(cells)) as meter:
        for row, fresh in _run_all(cells, config.output, workers):
            meter.advance(f"{row['variant']}, seed {row['seed']}")
            if fresh:
                # A run may take days, so its table is written after every cell.
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
                       stage=stage, decoding=config.decoding, device=config.device)


def run_cell(cell: Cell, output: str) -> dict[str, Any]:
    """Trains and measures one cell, or goes on with it; returns its figures, which are kept beside its policy."""
    directory = cell.directory(output)
    conversion = ConversionConfig(
        output=str(directory / "policy"), parent=cell.parent, data=cell.data, block_size=cell.block_size,
        stages=(cell.stage,), seed=cell.seed, save_dtype="float32", device=cell.device,
    )
    last: dict[str, Any] = {}
    policy = run_stages(conversion, last.update)
    assert policy is not None  # only the other processes of a group are left without one
    decoding = cell.decoding
    dtype, device = placement(cell.device, decoding.dtype)
    if device.type != "cpu" or dtype != "float32":
        policy = load_policy(directory / "policy", dtype, device)
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
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        futures = [pool.submit(run_cell, cell, output) for cell in missing]
        try:
            for future in as_completed(futures):
                yield future.result(), True
        except BaseException:
            # The pool waits for cells that run, which take minutes.
            for future in futures:
                future.cancel()
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _start_worker() -> None:
    """One thread, and an end when the parent ends, also by SIGKILL: a worker would wait for its next cell for ever."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _figures(cell: Cell, output: str) -> dict[str, Any] | None:
    path = cell.directory(output) / "figures.json"
    # The name of a variant is not part of what makes a cell.
    return {**json.loads(path.read_text()), "variant": cell.variant} if path.is_file() else None


def _finished(cells: Sequence[Cell], output: str) -> list[dict[str, Any]]:
    return [figures for cell in cells if (figures := _figures(cell, output)) is not None]


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    def changed(old: Any, new: Any) -> Any:
        return _merged(old if isinstance(old, Mapping) else {}, new) if isinstance(new, Mapping) else new

    return {**base, **{key: changed(base.get(key), value) for key, value in changes.items()}}


def _parent(config: AblationConfig) -> dict[str, Any]:
    """The parent's AR loss and pass@1 on the same tasks."""
    path = Path(config.output) / f"parent-{hashlib.blake2b(repr(config.decoding).encode(), digest_size=5).hexdigest()}.json"
    if path.is_file():
        return json.loads(path.read_text())
    decoding = config.decoding
    parent = load_policy(config.parent, *placement(config.device, decoding.dtype))
    tasks = make_tasks("heldout", decoding.tasks, decoding.seed, config.data.families or None)
    result = evaluate(parent, tasks, sampler="ar", schedule=Schedule("ar"), max_tokens=decoding.max_tokens,
                      batch=decoding.batch, seed=decoding.seed)
    figures = dict(ar_loss=evaluate_ar_loss(parent, tasks), pass_at_1=result.pass_at_1,
                   standard_error=result.standard_error, answer_tokens=result.answer_tokens)
    write_json(path, figures)
    return figures


def _write(path: Path, config: AblationConfig, rows: list[dict[str, Any]]) -> None:
    report = dict(config=config.model_dump(mode="json"), parent=_parent(config), cells=rows,
                  machine=describe(resolved(config.device)))
    write_json(path.with_suffix(".json"), report)
    write_atomic(path.with_suffix(".md"), table(report).encode())
    plot(report, path.with_suffix(".png"))
