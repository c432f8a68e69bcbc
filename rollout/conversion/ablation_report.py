"""The ablation's JSON as a Markdown table and as a picture.

Invariants: made from the JSON alone; a variant without a finished cell is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...files import whole_file
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
    """Writes a PNG, whole or not at all: tokens per forward by variant, one dot per seed, and acceptance by slot."""
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
        figure.savefig(temporary, format="png", dpi=120)
