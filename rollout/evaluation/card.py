"""The figures of `blockroll eval` as Markdown, and the model card around them.

Invariants: made from the JSON, the policy and the recipe beside it alone; it claims nothing that was not measured, and names no
path of the machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...model.config import MAX_CONFIG_BYTES, read_json
from ...model.conversion.config import ConversionConfig
from ...model.policy import Policy
from ...settings import load_yaml
from .training import RECIPE


def card(policy: Policy, figures: dict[str, Any], directory: Path, picture: str | None = None) -> str:
    """The model card, Markdown.

    Args:
        directory: the policy's; its recipe and weights are described.
        picture: the plot's place, relative to the card.
    """
    c = policy.config
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    saved = read_json(directory / "config.json", MAX_CONFIG_BYTES)
    stored = saved.get("dtype") or saved.get("torch_dtype") or str(policy.dtype).removeprefix("torch.")
    markov = f", Markov head of rank {policy.markov.rank}" if policy.markov is not None else ""
    colder = "" if policy.draft_temperature == 1 else f", drafts at {policy.draft_temperature:g} times the temperature"
    lines = [
        f"# {directory.name}",
        "",
        "A ZAYA policy converted from autoregressive decoding to single-step block diffusion by `blockroll convert`."
        if policy.converted else "A ZAYA policy, not converted: drafts of its mask rows mean nothing.",
        "",
        f"- Parameters: {sum(p.numel() for p in policy.parameters()):,}; weights {size / 2**20:.1f} MiB ({stored}).",
        f"- Dimensions: {c.num_hidden_layers} layers, hidden {c.hidden_size}, {c.num_attention_heads} query and"
        f" {c.num_key_value_heads} key/value heads of {c.head_dim}, {c.num_experts} experts of {c.moe_intermediate_size},"
        f" vocabulary {c.vocab_size}, at most {c.max_position_embeddings} positions.",
        f"- Block size {policy.block_size}, mask token {policy.mask_token_id}{markov}{colder}.",
        "- Tasks: of files of one's own" + f"; kinds {', '.join(figures['families'])}." if _own(figures) else
        f"- Tasks: reasoning-gym's, written as question, worked steps, answer; families {', '.join(figures['families'])}.",
        *_training(directory),
        "",
        "## Figures",
        "",
        *figures_as_markdown(figures),
    ]  # fmt: skip
    if picture is not None:
        lines += ["", f"![Tokens per forward, right answers, acceptance]({picture})"]
    return "\n".join(lines) + "\n"


def conclusion(figures: dict[str, Any]) -> str:
    """One line: what the fastest sampler that keeps p makes, how many answers are right, and how many of `ar`'s."""
    temperature = figures["temperatures"][0]
    ways = [way for way in figures["ways"] if way["policy"] == "policy" and way["block_size"] == figures["block_size"]
            and way["temperature"] == temperature and way["sampler"] != "mixed"]  # fmt: skip
    fast, ar = max(ways, key=lambda way: way["tokens_per_forward"]), next(way for way in ways if way["sampler"] == "ar")
    right = "; ".join(f"{way['name']} {100 * way['pass_at_1']:.1f} ± {100 * way['standard_error']:.1f} % right" for way in
                      ([ar] if fast is ar else [fast, ar]))  # fmt: skip
    return (f"{figures['policy']}, T={temperature:g}: {fast['name']}, {fast['tokens_per_forward']:.2f} tokens per forward;"
            f" {right} ({figures['tasks']} held-out tasks)")  # fmt: skip


def figures_as_markdown(figures: dict[str, Any], everything: bool = True) -> list[str]:
    """The figures, line by line, the conclusion first. `everything`: pass@k, families and drafts too."""
    errors, machine, disjoint = figures["standard_error"], figures["machine"], figures["disjoint"]
    ways, temperature = figures["ways"], figures["temperatures"][0]
    levels = ",".join(map(str, figures["levels"]))
    lines = [
        f"**{conclusion(figures)}**" if everything else conclusion(figures),
        "",
        f"{figures['tasks']} held-out tasks, {figures['samples']} sample(s) of each at temperature {temperature:g} and one"
        f" elsewhere, at most {figures['max_tokens']} tokens, seed {figures['seed']}; schedule fused {{{levels}}} but for `ar`,"
        f" block size {figures['block_size']}, batch {figures['batch']}, {figures['dtype']}. {machine['processor']},"
        f" {machine['cores']} cores, {machine['torch_threads']} torch thread(s), torch {machine['versions']['torch']},"
        f" {machine['date']}. ± is the standard error over tasks. Tokens per forward leave prefill out;"
        " tokens/s includes it. pass@1 is the share of samples that are right, block the mask rows of a block.",
        "",
        *_losses(figures),
        "- Entropy of p, nats per token of its own samples: "
        + ", ".join(f"{_estimate(v, errors['ar_entropy'][t], 4)} at T={t}" for t, v in figures["ar_entropy"].items()) + ".",
        f"- Training documents drawn again from the recipe and compared: {disjoint['training_tasks_compared']:,}; none begins"
        " with a task's prompt." + "".join(f" Not compared: {why}." for why in disjoint["not_compared"]),
    ]  # fmt: skip
    if "batch_1" in figures:
        check = figures["batch_1"]
        lines.append(
            f"- Alone, the first {check['tasks']} tasks take {check['tokens_per_forward']:.3f} tokens per forward, in the batch"
            f" {check['tokens_per_forward_in_batch']:.3f}; {check['equal_samples']} of {check['tasks']} samples are the same."
        )
    if "tokens_per_forward_by_draft_temperature" in figures:
        found = ", ".join(f"{_estimate(value, errors['tokens_per_forward_by_draft_temperature'][t], 2)} at {t}"
                          for t, value in figures["tokens_per_forward_by_draft_temperature"].items())
        lines.append(f"- Tokens per forward of {figures['drafting']} by the temperature of its drafts, as a multiple of its own:"
                     f" {found}.")
    if _own(figures):
        rewards = ", ".join(f"{_estimate(value, errors['reward'][name][t], 3)} for {name} at T={t}"
                            for name, row in figures["reward"].items() for t, value in row.items())
        lines.append(f"- Mean reward: {rewards}. Samples without a reward, which count as 0: {figures['unrewarded']}.")
    rows = []
    for way in ways:
        rows.append([way["policy"], way["name"], f"{way['temperature']:g}", str(way["block_size"]), str(way["samples"]),
                     _estimate(way["tokens_per_forward"], way["tokens_per_forward_standard_error"], 2),
                     _estimate(way["pass_at_1"], way["standard_error"], 3), f"{way['answer_tokens']:.1f}",
                     f"{way['tokens_per_s']:,.0f}"])  # fmt: skip
    head = ["", "sampler", "T", "block", "samples", "tokens/forward", "pass@1", "answer tokens", "tokens/s"]
    lines += ["", *_table(head, rows, left=2)]
    if not everything:
        return [*lines, "", "--all: pass@k, pass@1 by family, drafts accepted by kind of token and by slot"]
    lines += ["", f"pass@k, T={temperature:g}:", ""]
    lines += _table(["sampler", *map(str, figures["k"])],
                    ([name, *(_estimate(value, errors["pass_at"][name][k], 3) for k, value in row.items())]
                     for name, row in figures["pass_at"].items()))  # fmt: skip
    first = [way for way in ways if way["temperature"] == temperature and way["block_size"] == figures["block_size"]]
    lines += ["", f"pass@1 by family, T={temperature:g}:", ""]
    lines += _table(["", "sampler", *figures["families"]],
                    ([way["policy"], way["name"], *(f"{way['families'][family]:.3f}" for family in figures["families"])]
                     for way in first), left=2)  # fmt: skip
    if "drafting" in figures:
        lines += _drafts(figures)
    return lines


def _own(figures: dict[str, Any]) -> bool:
    """Whether the tasks are the user's. Figures without the key are of reasoning-gym's."""
    return bool(figures.get("source") == "own")


def _losses(figures: dict[str, Any]) -> list[str]:
    """A line for each AR loss that was measured."""
    errors, lines = figures["standard_error"], []
    told = {"ar_loss": "the tasks' own completions", "document_loss": f"{figures.get('documents')} held-out documents"}
    for name, what in told.items():
        if name in figures:
            parent = f"parent_{name}"
            beside = f"; of its parent {_estimate(figures[parent], errors[parent], 4)}" if parent in figures else ""
            lines.append(f"- AR loss on {what}, nats per token: {_estimate(figures[name], errors[name], 4)}{beside}.")
    return lines


def _drafts(figures: dict[str, Any]) -> list[str]:
    name, temperature = figures["drafting"], figures["temperatures"][0]
    lines = ["", f"Drafts accepted by kind of the token that was committed there, {name}, T={temperature:g}:", ""]
    kinds = figures["acceptance_by_kind"]
    lines += _table(["", *(kind.replace("_", ", ") for kind in kinds)], [
        ["share of tokens", *(f"{kind['share']:.3f}" for kind in kinds.values())],
        ["accepted", *("" if kind["acceptance"] is None else f"{kind['acceptance']:.3f}" for kind in kinds.values())],
    ])  # fmt: skip
    slots = figures["acceptance_by_slot"]
    most = max(map(len, slots.values()), default=0)
    lines += ["", f"Acceptance of slot i of a fresh block after those before it, lossless, T={temperature:g}, by block size, at"
              " the same places of the same texts:", ""]
    lines += _table(["block", *map(str, range(1, most + 1))],
                    ([size, *(f"{value:.3f}" for value in row), *[""] * (most - len(row))]
                     for size, row in slots.items()))  # fmt: skip
    if len(slots) > 1:
        gap, small, large, slot = largest_gap(slots)
        lines += ["", f"Largest difference at one slot: {100 * gap:.1f} % (slot {slot}, block sizes {small} and {large})."]
    return lines


def largest_gap(slots: dict[str, Sequence[float]]) -> tuple[float, str, str, int]:
    """(|a / b - 1|, one block size, the largest, slot from 1) where slots of a block size differ most from the largest's."""
    large = max(slots, key=int)
    gaps = [(abs(a / b - 1), size, large, slot) for size, row in slots.items() if size != large
            for slot, (a, b) in enumerate(zip(row, slots[large], strict=False), start=1) if b]  # fmt: skip
    return max(gaps, default=(0.0, large, large, 1))


def _training(directory: Path) -> list[str]:
    if not (directory / RECIPE).is_file():
        return []
    try:
        recipe = load_yaml(directory / RECIPE, ConversionConfig)
    except ConfigError:
        return ["", f"Trained by a recipe of another version, `{RECIPE}`."]
    rows = []
    for s in recipe.runs:
        weights = "AR" if s.kind == "ar" else \
            f"AR {s.alpha:g}; draft CE {s.draft.ce:g}, TV {s.draft.tv:g}, KL {s.draft.kl:g}, decay {s.draft.slot_decay:g}"
        rows.append([s.name, s.kind, f"{s.tokens:,}", f"{s.pack_tokens * s.packs_per_step:,}",
                     f"{s.learning_rate:g} to {s.final_learning_rate:g}", weights])  # fmt: skip
    head = ["stage", "kind", "tokens", "tokens per step", "learning rate", "loss weights"]
    return ["", f"## Training (`{RECIPE}`, seed {recipe.seed}; log in `training.jsonl`)", "", *_table(head, rows, left=2)]


def _estimate(value: float, error: float, digits: int) -> str:
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """A Markdown table whose first `left` columns are words."""
    bar = "|" + "---|" * left + "---:|" * (len(head) - left)
    return [f"| {' | '.join(head)} |", bar, *(f"| {' | '.join(row)} |" for row in rows)]
