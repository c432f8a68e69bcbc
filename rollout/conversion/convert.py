"""`blockroll convert`: train through the stages of a file, measure what came out, leave a card beside the weights.

Invariants:
- Figures are of the policy as it was rounded for the disk, and never stay beside weights they do not describe: those of
  an earlier run are removed before new weights take their place.
- Nothing is measured here: figures, plot and card are what `blockroll eval` makes of the directory.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from ...files import check_directory, locked_name, storing, write_atomic, write_json
from ...model.conversion.config import ConversionConfig
from ...model.conversion.train import run as run_stages
from ...model.conversion.train import stage_directory
from ...settings import load_yaml, whole_text
from ..evaluation.documents import document_figures
from ..evaluation.options import Options
from ..evaluation.report import evaluate_policy
from ..progress import TrainingMeter

_FIGURES, _PLOT, _CARD = "figures.json", "figures.png", "card.md"


def convert(
    config_path: str | os.PathLike[str], on_progress: Callable[[dict[str, Any]], None] | None = None
) -> Path:
    """Runs the conversion a file describes and measures the result. Finished stages are not trained again.

    Under torchrun, or with `launcher: {kind: ray}`, the stages train on several processes; the first one measures.
    Writes the policy directory `output`, with the recipe (`recipe.yaml`), the training log (`training.jsonl`) and, where
    `evaluation_tasks` asks for them, `figures.json`, `figures.png` and `card.md`; where there are `evaluation_documents` and no
    tasks, `figures.json` alone, with the loss on them. Returns the directory.

    Args:
        on_progress: called with each reported row of the training.

    Raises:
        ConfigError: the file is not a conversion's.
        StorageError: something could not be written whole.
    """
    config = load_yaml(config_path, ConversionConfig)
    recipe, output = whole_text(config_path).encode(), Path(config.output)  # as it was when the run began
    check_directory(output)
    # Of several processes each comes here, but one speaks and writes.
    first = os.environ.get("RANK", "0") == "0"
    with locked_name(output) if first else nullcontext():
        return _convert(config, recipe, output, first, on_progress)


def _convert(
    config: ConversionConfig, recipe: bytes, output: Path, first: bool, on_progress: Callable[[dict[str, Any]], None] | None
) -> Path:
    with TrainingMeter() if first else nullcontext(lambda _: None) as meter:

        def report(row: dict[str, Any]) -> None:
            meter(row)
            if on_progress is not None:
                on_progress(row)

        forget = partial(_remove_figures, output)
        if config.launcher.kind == "ray":
            from .ray_train import run_on_ray

            run_on_ray(config, report, forget)
        else:
            run_stages(config, report, forget)
    if not first:
        return output
    write_atomic(output / "recipe.yaml", recipe)
    log = output.with_name(output.name + ".log.jsonl")
    if log.is_file():
        write_atomic(output / "training.jsonl", log.read_bytes())
    if config.evaluation_tasks:
        tasks, samples = config.evaluation_tasks, config.evaluation_samples
        options = Options(tasks=tasks, samples=samples, mix_weights=(0.5,), seed=config.seed,
                          device=config.device, dtype=config.dtype)
        evaluate_policy(output, options, source=config.evaluation_source, documents=config.evaluation_documents,
                        parent_name=parent_of(config), json_path=output / _FIGURES, card_path=output / _CARD)
    elif config.evaluation_documents is not None:
        write_json(output / _FIGURES, document_figures(output, parent_of(config), config.evaluation_documents, Options.documents,
                                                       config.seed, config.device, config.dtype))
    return output


def parent_of(config: ConversionConfig) -> Path | str | None:
    """The policy that was converted: what the last autoregressive stage before the conversion left, or the one given."""
    stages = [stage.name for stage in takewhile(lambda stage: stage.kind == "ar", config.runs)]
    return stage_directory(config, stages[-1]) if stages else config.parent


def _remove_figures(output: Path) -> None:
    for name in (_FIGURES, _PLOT, _CARD):
        with storing(output / name):
            (output / name).unlink(missing_ok=True)
