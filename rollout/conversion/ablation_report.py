"""The ablation's JSON as a Markdown table and as a picture.

Invariants: made from the JSON alone; a variant without a finished cell is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.plots import LEAST_SURVIVAL
from ..plot_style import BLACK, BLUE, ORANGE, head, picture
from ..types import SamplerName

WAYS: tuple[tuple[SamplerName, float], ...] = (("lossless", 1.0), ("lossless", 0.3), ("mixed", 1.0), ("mixed", 0.3))
"""(sampler, temperature) each cell is decoded with: a column of tokens per forward."""


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


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG, whole or not at all: a row per variant, with tokens per forward by way on the left, one mark per seed, and
    acceptance by draft as a table of shades on the right."""
    variants = _variants(report)
    seeds, decoding = report["config"]["seeds"], report["config"]["decoding"]
    detail = (f"Each variant: {len(seeds)} seed(s), {decoding['tasks']} held-out tasks each. A line spans the seeds. On the right"
              f" the mean over seeds, where at least {100 * LEAST_SURVIVAL:g} % of the steps come that far.")  # fmt: skip
    with picture(path, 1, 2, 1.9 + 0.36 * max(len(variants), 4), detail, sharey=True, width_ratios=(1.15, 1)) as axes:
        _plot_speed(axes[0][0], report, variants)
        _plot_acceptance(axes[0][1], report, variants)


def _plot_speed(axes: Any, report: Mapping[str, Any], variants: list[str]) -> None:
    samplers = list(dict.fromkeys(sampler for sampler, _ in WAYS))
    means = dict[str, float]()
    for w, (sampler, temperature) in enumerate(WAYS):
        colour, marker, full = (BLUE, ORANGE)[samplers.index(sampler)], "oD"[samplers.index(sampler)], temperature == WAYS[0][1]
        for place, variant in enumerate(variants):
            values = _values(report, variant, lambda row, way=(sampler, temperature): _way(row, *way)["tokens_per_forward"])  # type: ignore[misc]
            if not w:
                means[variant] = float(values.mean())
            at = place + 0.18 * (w - (len(WAYS) - 1) / 2)  # ways do not hide each other
            axes.plot([values.min(), values.max()], [at, at], color=colour, lw=1)
            axes.plot(values, [at] * len(values), marker, color=colour, markersize=3.4, fillstyle="full" if full else "none",
                      label=f"{sampler}, T={temperature:g}" if not place else None)  # fmt: skip
    best = max(means, key=means.__getitem__, default="")
    finding = f"{best}: {means[best]:.2f} tokens per forward,\n{variants[0]} {means[variants[0]]:.2f}" if means else "No cells"
    head(axes, finding, f"one mark per seed; the title speaks of {WAYS[0][0]}, T={WAYS[0][1]:g}")
    axes.set(yticks=range(len(variants)), yticklabels=variants, xlabel="tokens per forward", ylim=(len(variants) - 0.4, -0.6))
    axes.legend(loc="best")
    for place in range(1, len(variants)):
        axes.axhline(place - 0.5, color="#E3E6EA", lw=0.6)
    axes.grid(axis="y", visible=False)


def _plot_acceptance(axes: Any, report: Mapping[str, Any], variants: list[str]) -> None:
    rows = {variant: _reached(report, variant) for variant in variants}
    most = max(map(len, rows.values()), default=0)
    shades = np.full((len(variants), max(most, 1)), np.nan)
    for place, row in enumerate(rows.values()):
        shades[place, : len(row)] = row
    extent = 0.5, shades.shape[1] + 0.5, len(variants) - 0.5, -0.5
    axes.imshow(shades, aspect="auto", cmap="Blues", vmin=0, vmax=1, extent=extent, interpolation="nearest")
    for place, row in enumerate(rows.values()):
        for k, value in enumerate(row, start=1):
            ink = "white" if value > 0.6 else BLACK
            axes.text(k, place, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=ink)
    first = {variant: row[0] for variant, row in rows.items() if row}
    best = max(first, key=first.__getitem__, default="")
    finding = f"{best}: {100 * first[best]:.0f} % of the first drafts\nare accepted" if first else "No drafts"
    head(axes, finding, f"% accepted, given all before were; {WAYS[0][0]}, T={WAYS[0][1]:g}")
    axes.set(xlabel="k-th draft of a step", xticks=range(1, most + 1), ylim=(len(variants) - 0.4, -0.6))
    axes.grid(visible=False)


def _reached(report: Mapping[str, Any], variant: str) -> list[float]:
    """`_acceptance`, as far as LEAST_SURVIVAL of the steps come with every seed."""
    cells = [_way(row, *WAYS[0]) for row in report["cells"] if row["variant"] == variant]
    far = min(sum(share >= LEAST_SURVIVAL for share in [1.0, *way["survival"]]) for way in cells)
    return _acceptance(report, variant)[:far]
