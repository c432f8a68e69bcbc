"""Summarises the bench's rows: fractions of the ceilings, tokens per second under a forced acceptance, tables and a plot.

Invariants: nothing is measured here; the summary can be made again from the rows. Tokens per second are of the engine's steps
by the clock, the host's part included: counted while measured (`measured`), or a curve's tokens over the same seconds (`forced`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...planning.predictions import predicted
from ...planning.roofline import Rates, Roofline, expected_tokens, geometric_survival
from ...plot_style import BLUE, GREY, head, picture, series
from ...schedule import Schedule
from ...wording import kibi, nearest, span
from .sizes import DEVICE, DRY, FORCED, Sizes

PUBLISHED = {
    "source": "Zyphra/vllm, docs/amd_nvidia_tidar_tput_tests.md: ZAYA1-8B on one H100, tokens/s, K = 16, greedy",
    "ar": {"1": 79.7, "8": 539.0, "16": 968.0, "64": 3094.0},
    "two_pass": {"1": 207.6, "8": 973.0, "16": 1603.0, "64": 3483.0},
    "two_pass_tokens_per_step": {"1": 7.6, "8": 6.1, "16": 6.8, "64": 6.9},
}
NOTE = (
    "Random weights; acceptance forced to geometric survival curves; experts forced to a uniform choice. Steps are the engine's"
    " own, by the clock, `lossless` at temperature 1 (`ar` for itself), under the curve of"
    f" {FORCED[-1]:g} tokens per full step; tokens of other curves are computed, over the same seconds."
)


def summarise(result: Mapping[str, Any]) -> dict[str, Any]:
    """`result` with ceilings and attention's best rates in front, a fraction in every row of a kernel, `training` and
    `decode`.

    A row of `decode` holds what was counted (`measured`), and of each forced acceptance of n tokens what its schedule should make
    of the curve that commits n with a whole block of drafts, and the ratio if it committed exactly n.
    """
    sections = {name: dict(rows) for name, rows in result["sections"].items()}
    ceilings: dict[str, float] = {}
    for row in sections.get("ceilings", {}).values():
        ceilings |= {name: row[name] for name in ("copy_bytes_per_s", "matmul_flops_per_s", "seconds_per_launch") if name in row}
    known = {} if result["machine"].get("dry_run") else predicted(str(result["machine"].get("device", "")))
    kernels = {
        name: _with_fractions(row, ceilings, known.get("kernels", {}), name) for name, row in sections.get("kernels", {}).items()
    }
    if kernels:
        sections["kernels"] = kernels
    attention = [row for row in kernels.values() if row.get("kind") == "attention" and "bytes_per_s" in row]
    best = {
        f"best_{unit}_per_s": max((row[f"{unit}_per_s"] for row in attention), default=None) for unit in ("bytes", "flops")
    }
    return {
        "note": NOTE, **result, "ceilings": ceilings, "attention": best, "published": PUBLISHED,
        "training": _training(sections.get("training", {})),
        "decode": _decode(
            sections.get("steps", {}), ceilings, bool(result["machine"].get("dry_run")), known.get("steps", {})
        ), "sections": sections,
    }  # fmt: skip


def _with_fractions(
    row: dict[str, Any], ceilings: Mapping[str, float], known: Mapping[str, Any], name: str
) -> dict[str, Any]:
    if "parts" in row:
        parts = {part: _with_fractions(each, ceilings, known, f"{name} {part}") for part, each in row["parts"].items()}
        return row | {"parts": parts}
    if not isinstance(row.get("seconds"), float):
        return row
    row = row | _beside(known.get(name), row["seconds"])
    row = row | {"bytes_per_s": row["bytes"] / row["seconds"], "flops_per_s": row["flops"] / row["seconds"]}
    if "copy_bytes_per_s" in ceilings:
        row["of_copy"] = row["bytes_per_s"] / ceilings["copy_bytes_per_s"]
    if "matmul_flops_per_s" in ceilings:
        row["of_matmul"] = row["flops_per_s"] / ceilings["matmul_flops_per_s"]
    return row


def _beside(prediction: Mapping[str, Any] | None, seconds: float) -> dict[str, float]:
    """What was predicted, and how many times that it took."""
    if prediction is None:
        return {}
    return {"predicted_seconds": prediction["ms"] / 1e3, "of_prediction": seconds / (prediction["ms"] / 1e3)}


@lru_cache(maxsize=2)
def _roofline(dry: bool) -> tuple[Sizes, Roofline]:
    sizes = DRY if dry else DEVICE
    return sizes, Roofline.of(sizes.zaya)


def _decode(
    steps: Mapping[str, Any], ceilings: Mapping[str, float], dry: bool, known: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One row per schedule, batch and context that was measured."""
    sizes, roofline = _roofline(dry)
    by_label = {schedule.within(roofline.block).label: schedule for schedule in sizes.schedules}
    rates = None
    if {"copy_bytes_per_s", "matmul_flops_per_s"} <= ceilings.keys():
        copies, products = ceilings["copy_bytes_per_s"], ceilings["matmul_flops_per_s"]
        rates = Rates(products, copies, products, copies)
    measured = [row for row in steps.values() if isinstance(row.get("seconds"), float) and "schedule" in row]
    ar = {(row["batch"], row["context"]): row for row in measured if row["kind"] == "ar"}
    rows = []
    for row in measured:
        batch, context, seconds = row["batch"], row["context"], row["seconds"]
        schedule, plain = by_label[row["schedule"]], ar.get((batch, context))
        names = ("schedule", "kind", "batch", "context", "rows", "seconds", "host_seconds", "waited_seconds", "forced_tokens")
        made: dict[str, Any] = {name: row[name] for name in names}
        if rates is not None:
            made["roofline_seconds"] = roofline.step(schedule, batch, context).seconds(rates)
            made["of_roofline"] = seconds / made["roofline_seconds"]
        made |= _beside(known.get(f"{row['schedule']} {batch} at {context}"), seconds)
        made["measured"] = {name: row[name] for name in ("tokens_per_step", "tokens_per_s")}
        if plain is not None:
            made["measured"]["ratio_to_ar"] = row["tokens_per_s"] / plain["tokens_per_s"]
        made["forced"] = {
            f"{tokens:g}": _forced(schedule, tokens, roofline.block, batch, seconds, plain["seconds"] if plain else None)
            for tokens in FORCED
        }
        rows.append(made)
    return rows


def _training(rows: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per policy of which both steps were measured: clean tokens/s, and their ratio."""
    measured: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows.values():
        if "tokens_per_s" in row:
            measured.setdefault(row["policy"], {})[row["kind"]] = row
    return [
        {
            "policy": policy, "tokens": kinds["ar"]["tokens"],
            **{f"{kind}_tokens_per_s": row["tokens_per_s"] for kind, row in kinds.items()},
            "diffusion_over_ar": kinds["diffusion"]["tokens_per_s"] / kinds["ar"]["tokens_per_s"],
        }
        for policy, kinds in measured.items()
        if len(kinds) == 2
    ]  # fmt: skip


def _forced(
    schedule: Schedule, tokens: float, block: int, batch: int, seconds: float, ar_seconds: float | None
) -> dict[str, float]:
    survival = geometric_survival(min(tokens, block), block)
    expected = expected_tokens(schedule, survival, block)
    made = {"tokens_per_step": expected, "tokens_per_s": batch * expected / seconds}
    if ar_seconds is not None:
        made["ratio_to_ar"] = expected * ar_seconds / seconds
        if schedule.kind != "ar":
            made["ratio_to_ar_if_exactly"] = tokens * ar_seconds / seconds
    return made


def _columns(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table: the first column to the left, numbers to the right."""
    table = [list(headings), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(headings))]
    return "\n".join(
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths)))
        for row in table
    )


def _prediction(row: Mapping[str, Any], unit: float, digits: int) -> tuple[str, str]:
    """Cells: the prediction in this unit, and the measured time over it."""
    if "predicted_seconds" not in row:
        return "", ""
    return f"{row['predicted_seconds'] * unit:.{digits}f}", f"{row['of_prediction']:.2f}"


def conclusion(made: Mapping[str, Any]) -> str:
    """One line: per context the fastest schedule at a batch near 16, and how the checks came out."""
    parts = []
    for context in sorted({row["context"] for row in made["decode"]}):
        rows = [row for row in made["decode"] if row["context"] == context]
        batch = nearest(row["batch"] for row in rows)
        fast = max((row for row in rows if row["batch"] == batch), key=lambda row: row["measured"]["tokens_per_s"])
        if "ratio_to_ar" in fast["measured"]:
            parts.append(f"batch {batch}, {kibi(context)}: {fast['schedule']}, {fast['measured']['ratio_to_ar']:.1f}x ar")
    checks = made["sections"].get("correctness", {}).values()
    if checks:
        parts.append(f"{sum(bool(row.get('ok')) for row in checks)} of {len(checks)} checks hold")
    return f"{made['machine'].get('device', 'no device')}: {'; '.join(parts) or 'nothing was measured'}"


def text(made: Mapping[str, Any], everything: bool = True) -> str:
    """The conclusion and the tables of a summary, to print. `everything`: kernels, training and forced acceptances too."""
    machine, sections = made["machine"], made["sections"]
    parts = [conclusion(made), f"{machine.get('versions', {})}", NOTE, *(_sections(made) if everything else ())]
    rows = [
        (row["schedule"], str(row["batch"]), str(row["context"]), f"{row['seconds'] * 1e3:.2f}",
         *_prediction(row, 1e3, 2), f"{row['host_seconds'] * 1e3:.2f}",
         f"{row['of_roofline']:.2f}" if "of_roofline" in row else "",
         *(cell for kind in (row["measured"], *(row["forced"].values() if everything else ())) for cell in
           (f"{kind['tokens_per_step']:.2f}", f"{kind['tokens_per_s']:,.0f}", f"{kind.get('ratio_to_ar', 0):.2f}")))
        for row in sorted(made["decode"], key=lambda row: (row["context"], row["batch"], row["kind"] != "ar"))
    ]  # fmt: skip
    if rows:
        kinds = ("measured", *(f"at {tokens:g}" for tokens in FORCED)) if everything else ("measured",)
        tokens = [cell for kind in kinds for cell in (f"tokens {kind}", "tokens/s", "x ar")]
        parts.append("Steps: milliseconds by the clock, those predicted and their ratio, the host's part, their multiple of the"
                     " roofline, tokens per step and second, and tokens/s over those of ar.")  # fmt: skip
        parts.append(_columns(("step", "batch", "context", "ms", "predicted", "x", "host ms", "x roofline", *tokens), rows))
        parts.append(f"Published, {PUBLISHED['source']}: ar {PUBLISHED['ar']}, two_pass {PUBLISHED['two_pass']}")
    failed = [
        f"{section}, {name}: {row['error']}" for section, of in sections.items() for name, row in of.items() if "error" in row
    ]
    return "\n\n".join([*parts, *failed, *([] if everything else ["--all: checks, kernels, training, forced acceptances"])])


def _sections(made: Mapping[str, Any]) -> Iterator[str]:
    """Ceilings, checks, kernels and training steps."""
    if made["ceilings"]:
        yield ", ".join(f"{name} {value:.3g}" for name, value in made["ceilings"].items())
    checks = [
        (name, "ok" if row.get("ok") else row.get("skipped") or row.get("error", "FAILED")[:90],
         f"{row['worst']:.1e}" if isinstance(row.get("worst"), float) else "")
        for name, row in made["sections"].get("correctness", {}).items()
    ]  # fmt: skip
    if checks:
        yield _columns(("check", "", "worst error"), checks)
    timed = []
    for name, row in made["sections"].get("kernels", {}).items():
        for part, each in row.get("parts", {"": row}).items():
            if isinstance(each.get("seconds"), float):
                timed.append((
                    f"{name} {part}".strip(), f"{each['seconds'] * 1e6:.1f}", *_prediction(each, 1e6, 1),
                    f"{each.get('of_copy', 0):.2f}", f"{each.get('of_matmul', 0):.2f}",
                ))  # fmt: skip
            else:
                timed.append((name, each.get("skipped") or each.get("error", "")[:60], "", "", "", ""))
    if timed:
        yield _columns(("kernel", "us", "predicted", "x", "of copy", "of matmul"), timed)
    trained = [
        (f"{row['policy']}, {row['tokens']} tokens", f"{row['ar_tokens_per_s']:,.0f}", f"{row['diffusion_tokens_per_s']:,.0f}",
         f"{row['diffusion_over_ar']:.2f}")
        for row in made["training"]
    ]  # fmt: skip
    if trained:
        yield _columns(("training step", "ar tokens/s", "diffusion tokens/s", "x ar"), trained)
    host = [
        (name, f"{row['seconds'] * 1e3:.2f}", f"{row['fastest'] * 1e3:.2f}")
        for name, row in made["sections"].get("host", {}).items() if "seconds" in row
    ]  # fmt: skip
    if host:
        yield _columns(("host of a step, no device", "ms", "fastest"), host)
    oracle = [
        (name, f"{row['seconds'] * 1e3:.2f}", f"{row['tokens_per_step']:.2f}", f"{row['tokens_per_s']:,.0f}",
         f"{row['ratio_to_ar']:.2f}", f"{row['diverged']} of {row['samples']}")
        for name, row in made["sections"].get("steps", {}).items() if "diverged" in row
    ]  # fmt: skip
    if oracle:
        yield _columns(("every draft stands", "ms", "tokens", "tokens/s", "x ar", "diverged"), oracle)


def write_plot(made: Mapping[str, Any], path: Path) -> bool:
    """Tokens per second by batch, one panel per context, and attention's fractions; False without matplotlib or rows."""
    contexts = sorted({row["context"] for row in made["decode"]})
    kernels = made["sections"].get("kernels", {}).values()
    attention = [row for row in kernels if row.get("kind") == "attention" and "of_copy" in row]
    panels = len(contexts) + bool(attention)
    if not panels or find_spec("matplotlib") is None:
        return False
    detail = (f"{made['machine'].get('device')}: random weights, forced acceptance ({FORCED[-1]:g} tokens per full step), the"
              f" engine's steps by the clock. Grey: {PUBLISHED['source']}.")  # fmt: skip
    rows, columns = -(-panels // 2), min(panels, 2)
    with picture(path, rows, columns, 0.7 + 3.2 * rows, detail) as grid:
        axes = [axis for line in grid for axis in line]
        for axis, context in zip(axes, contexts):
            _plot_speed(axis, [row for row in made["decode"] if row["context"] == context], context)
        if attention:
            shares = [max(row["of_copy"], row["of_matmul"]) for row in attention]
            names = [f"{row['batch']} x {row['rows']} at {row['context']}" for row in attention]
            axes[panels - 1].barh(names, shares, color=BLUE)
            axes[panels - 1].set(xlabel="share of the copy or matmul ceiling, the larger", xlim=(0, 1))
            head(axes[panels - 1], f"Attention reaches {span((100 * share for share in shares), 0)} % of its ceiling",
                 "batch x rows at context")
        for axis in axes[panels:]:
            axis.set_visible(False)
    return True


def _plot_speed(axis: Any, rows: Sequence[Mapping[str, Any]], context: int) -> None:
    """Tokens per second of every schedule at one context."""
    for i, label in enumerate(dict.fromkeys(row["schedule"] for row in rows)):
        some = sorted((row for row in rows if row["schedule"] == label), key=lambda row: row["batch"])
        axis.plot([row["batch"] for row in some], [row["measured"]["tokens_per_s"] for row in some], label=label, **series(i))
    for kind, style in (("ar", ":"), ("two_pass", "--")):
        known = PUBLISHED[kind]
        assert isinstance(known, dict)
        axis.plot([int(batch) for batch in known], list(known.values()), style, color=GREY, label=f"published: {kind}")
    fast = [max((row for row in rows if row["batch"] == batch), key=lambda row: row["measured"]["tokens_per_s"])
            for batch in sorted({row["batch"] for row in rows})]  # fmt: skip
    ratios = [row["measured"]["ratio_to_ar"] for row in fast if "ratio_to_ar" in row["measured"]]
    finding = f"Context {kibi(context)}: {span(ratios)}x ar" if ratios else f"Context {kibi(context)}"
    head(axis, finding, "tokens per second by batch, the fastest schedule in the title")
    batches = sorted({row["batch"] for row in rows} | {int(batch) for batch in PUBLISHED["ar"]})
    axis.set(xscale="log", yscale="log", xlabel="batch", ylabel="tokens/s", xticks=batches, xticklabels=batches)
    axis.minorticks_off()
    axis.legend(loc="best", fontsize=7)
