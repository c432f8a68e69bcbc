"""`blockroll convert`: train through the stages of a file, measure what came out, leave a card beside the weights.

Invariants:
- Figures are of the policy as it was rounded for the disk, and never stay beside weights they do not describe: those of
  an earlier run are removed before new weights take their place.
- Parent and converted policy answer the same tasks with the same seeds.
- The card is made from `figures.json` and the policy alone; it claims nothing that was not measured.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from ..files import storing, write_atomic, write_json
from ..model.checkpoint import load_policy
from ..model.conversion.config import ConversionConfig
from ..model.conversion.train import run as run_stages
from ..model.conversion.train import stage_directory
from ..model.policy import Policy
from ..model.tasks import make_tasks
from ..settings import load_yaml
from .evaluation import evaluate, evaluate_ar_loss
from .machine import describe
from .progress import Meter, TrainingMeter
from .schedule import Schedule
from .types import SamplerName

WAYS: tuple[tuple[SamplerName, Schedule], ...] = (
    ("ar", Schedule("ar")),
    ("lossless", Schedule("fused", levels=(0, 4))),
    ("lossless", Schedule("fused", levels=(0, 4, 8))),
    ("lossless", Schedule("two_pass")),
    ("coupled", Schedule("fused", levels=(0, 4))),
    ("mixed", Schedule("fused", levels=(0, 4))),
)
"""How the converted policy is decoded for its card, at batch 1 and temperature 1; its parent is decoded with `ar`."""


def convert(
    config_path: str | os.PathLike[str], on_progress: Callable[[dict[str, Any]], None] | None = None
) -> Path:
    """Runs the conversion a file describes and measures the result. Finished stages are not trained again.

    Under torchrun, or with `launcher: {kind: ray}`, the stages train on several processes; the first one measures.
    Writes the policy directory `output`, with the recipe (`recipe.yaml`), the training log (`training.jsonl`) and, where
    `evaluation_tasks` asks for them, `figures.json` and `card.md`. Returns the directory.

    Args:
        on_progress: called with each reported row of the training.

    Raises:
        ConfigError: the file is not a conversion's.
        StorageError: something could not be written whole.
    """
    config = load_yaml(config_path, ConversionConfig)
    recipe, output = Path(config_path).read_bytes(), Path(config.output)  # as it was when the run began
    # Of several processes each comes here, but one speaks and writes.
    first = os.environ.get("RANK", "0") == "0"
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
        policy = load_policy(output)
        figures = measure(policy, parent_of(config), config)
        write_json(output / "figures.json", figures)
        write_atomic(output / "card.md", card(policy, figures, config, output).encode())
    return output


def parent_of(config: ConversionConfig) -> Path | str | None:
    """The policy that was converted: what the last autoregressive stage before the conversion left, or the one given."""
    stages = [stage.name for stage in takewhile(lambda stage: stage.kind == "ar", config.runs)]
    return stage_directory(config, stages[-1]) if stages else config.parent


def _remove_figures(output: Path) -> None:
    for name in ("figures.json", "card.md"):
        with storing(output / name):
            (output / name).unlink(missing_ok=True)


def measure(policy: Policy, parent: Path | str | None, config: ConversionConfig) -> dict[str, Any]:
    """The figures of a converted policy and its parent on `config.evaluation_tasks` held-out tasks."""
    tasks = make_tasks("heldout", config.evaluation_tasks, config.seed, config.data.families or None)
    contestants = [("converted", policy, sampler, schedule) for sampler, schedule in WAYS]
    losses = {"converted": evaluate_ar_loss(policy, tasks)}
    if parent is not None:
        before = load_policy(parent)
        before.tokenizer = before.tokenizer or policy.tokenizer
        losses["parent"] = evaluate_ar_loss(before, tasks)
        contestants.insert(0, ("parent", before, "ar", Schedule("ar")))
    rows = []
    for name, one, sampler, schedule in contestants:
        with Meter(f"{name}, {sampler}, {_shape(schedule.kind, schedule.levels)}", len(tasks)) as meter:
            result = evaluate(
                one, tasks, sampler=sampler, schedule=schedule, seed=config.seed,
                on_finish=lambda sample, meter=meter: meter.advance(len(sample.tokens), sample.forwards),  # type: ignore[misc]
            )
        rows.append({"policy": name, **asdict(result)})
    return {"split": "heldout", "ar_loss": losses, "rows": rows, "machine": describe()}


def card(policy: Policy, figures: dict[str, Any], config: ConversionConfig, directory: Path) -> str:
    """The model card, Markdown."""
    c, first = policy.config, figures["rows"][0]
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    machine = figures["machine"]
    families = sorted(first["families"])
    lines = [
        f"# {directory.name}",
        "",
        "A ZAYA policy converted from autoregressive decoding to single-step block diffusion by `blockroll convert`.",
        "",
        f"- Parameters: {sum(p.numel() for p in policy.parameters()):,}; weights {size / 2**20:.1f} MiB"
        f" ({config.save_dtype}).",
        f"- Dimensions: {c.num_hidden_layers} layers, hidden {c.hidden_size}, {c.num_attention_heads} query and"
        f" {c.num_key_value_heads} key/value heads of {c.head_dim}, {c.num_experts} experts of {c.moe_intermediate_size},"
        f" vocabulary {c.vocab_size}, at most {c.max_position_embeddings} positions.",
        f"- Block size {policy.block_size}, mask token {policy.mask_token_id}.",
        f"- Data: reasoning-gym tasks written as question, worked steps, answer; families {', '.join(families)};"
        f" training split, seed {config.data.seed}.",
        "",
        f"## Training (`recipe.yaml`, seed {config.seed}; log in `training.jsonl`)",
        "",
        "| stage | kind | tokens | tokens per step | learning rate | loss weights |",
        "|---|---|---:|---:|---|---|",
    ]
    for s in config.stages:
        weights = "AR" if s.kind == "ar" else \
            f"AR {s.alpha:g}; draft CE {s.draft.ce:g}, TV {s.draft.tv:g}, KL {s.draft.kl:g}, decay {s.draft.slot_decay:g}"
        lines.append(f"| {s.name} | {s.kind} | {s.tokens:,} | {s.pack_tokens:,} |"
                     f" {s.learning_rate:g} to {s.final_learning_rate:g} | {weights} |")
    losses = ", ".join(f"{name} {value:.4f}" for name, value in sorted(figures["ar_loss"].items()))
    lines += [
        "",
        "## Figures",
        "",
        f"{first['tasks']} held-out tasks, {first['samples']} sample each, temperature {first['temperature']:g}, batch"
        f" {first['batch']}, at most {first['max_tokens']} tokens, seed {first['seed']}, float32."
        f" {machine['processor']}, {machine['cores']} cores, {machine['torch_threads']} torch thread(s),"
        f" torch {machine['versions']['torch']}, {machine['date']}.",
        "Tokens per forward and per step leave prefill out; tokens/s includes it. pass@1 is given with its standard error.",
        f"Loss of the AR head on the tasks' own completions, nats per token: {losses}.",
        "",
        "| policy | sampler | schedule | pass@1 | tokens/forward | tokens/step | answer tokens | tokens/s |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in figures["rows"]:
        sampler = row["sampler"] + (f" {row['mix_weight']:g}" if row["mix_weight"] is not None else "")
        lines.append(
            f"| {row['policy']} | {sampler} | {_shape(row['schedule'], row['levels'])} | {row['pass_at_1']:.3f} ±"
            f" {row['standard_error']:.3f} | {row['tokens_per_forward']:.2f} | {row['tokens_per_step']:.2f} |"
            f" {row['answer_tokens']:.1f} | {row['tokens_per_s']:,.0f} |"
        )
    lines += ["", "pass@1 by family:", "", "| policy | sampler | schedule | " + " | ".join(families) + " |",
              "|---|---|---|" + "---:|" * len(families)]
    for row in figures["rows"]:
        values = " | ".join(f"{row['families'][family]:.3f}" for family in families)
        lines.append(f"| {row['policy']} | {row['sampler']} | {_shape(row['schedule'], row['levels'])} | {values} |")
    return "\n".join(lines) + "\n"


def _shape(kind: str, levels: Any) -> str:
    return f"fused {{{','.join(map(str, levels))}}}" if kind == "fused" else kind
