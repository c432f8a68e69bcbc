"""The report of `blockroll tradeoff` as a picture, and what both say of it in words.

Invariants: made from the report alone. Tokens per forward never stand without the clock and the accuracy beside them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from ...files import whole_file

_COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
"""Okabe and Ito's, which colour-blind readers tell apart; black is ar."""
_CURVES = 6
"""Ways that have curves; all are in the lower row."""


def reach(reference: Mapping[str, Any], way: Mapping[str, Any], batch: str) -> list[dict[str, float | None]]:
    """For each of the reference's majority@k: the accuracy, and the seconds in which the way reaches it over those of the
    reference. Between two k the way's accuracy is interpolated. None: not reached with as many samples as were drawn."""
    ks = sorted(map(int, way["majority_at"]))
    curve = [(0.0, 0.0), *((k, way["majority_at"][str(k)]) for k in ks)]
    found: list[dict[str, float | None]] = []
    for k in ks:
        wanted = reference["majority_at"][str(k)]
        needed = _least(curve, wanted)
        # One sample is the least there is.
        spent = None if needed is None else max(needed, 1.0) * way["seconds"][batch]
        found.append({"k": k, "accuracy": wanted, "ratio": None if spent is None else spent / (k * reference["seconds"][batch])})
    return found


def _least(curve: Sequence[tuple[float, float]], wanted: float) -> float | None:
    """The smallest k at which the curve of (k, accuracy), straight between its points, has what is wanted."""
    for (k, low), (following, high) in pairwise(curve):
        if high >= wanted:
            return k + (following - k) * (wanted - low) / (high - low) if high > low else following
    return None


def conclusion(report: Mapping[str, Any]) -> str:
    """One line: what the fastest way by tokens per forward costs, and the fastest one that changes nothing."""
    reference, *drafting = report["ways"]
    batch = str(report["batches"][0])
    if not drafting:
        return f"ar: {reference['pass_at']['1']:.3f} right"
    most = max(drafting, key=lambda way: way["tokens_per_forward"])
    exact = [way for way in drafting if way["sampler"] != "mixed"]
    fastest = min(exact or drafting, key=lambda way: way["seconds"][batch])
    parts = []
    for way in (fastest,) if fastest is most else (fastest, most):
        points = 100 * (way["pass_at"]["1"] - reference["pass_at"]["1"])
        speed = 1 / way["ratio_to_ar"][batch]
        parts.append(f"{way['name']}: {way['tokens_per_forward']:.1f} tokens per forward, {speed:.1f}x the speed of ar at batch "
                     f"{batch}, pass@1 {points:+.1f} points")  # fmt: skip
    return "; ".join(parts)


def draw(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a PNG, whole or not at all. Bars are two standard errors long, one to each side."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    ways = report["ways"]
    figure = Figure(figsize=(15, 5.4 + 0.26 * len(ways)), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(4.2, 1 + 0.26 * len(ways)))
    upper, lower = halves
    figure.suptitle(conclusion(report), fontsize=10)
    batches = [str(report["batches"][0]), str(report["batches"][-1])]
    panels = upper.subplots(1, 4, sharey=True)
    curves = _shown(ways, batches[0])
    for axes, (label, cost) in zip(panels, (
        (f"seconds per question, batch {batches[0]}", lambda way: way["seconds"][batches[0]]),
        (f"seconds per question, batch {batches[1]}", lambda way: way["seconds"][batches[1]]),
        ("forwards per question", lambda way: way["forwards"]),
        ("tokens per question", lambda way: way["tokens"]),
    ), strict=True):  # fmt: skip
        for colour, way in zip(_COLOURS, curves, strict=False):
            ks = [int(k) for k in way["majority_at"]]
            costs = [k * cost(way) for k in ks]
            axes.errorbar(costs, list(way["majority_at"].values()), list(way["standard_error"]["majority_at"].values()),
                          marker="o", markersize=4, color=colour, label=way["name"])  # fmt: skip
            axes.plot(costs, list(way["pass_at"].values()), linestyle=":", color=colour)
        axes.set_xscale("log", base=4)
        axes.set_xlabel(f"{label} (k = 1 to {report['k'][-1]})")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("right answers: majority@k (line), pass@k (dots)")
    upper.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    _rows(lower, report, batches)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _shown(ways: Sequence[dict[str, Any]], batch: str) -> list[dict[str, Any]]:
    """`ar`, and of each sampler and weight the fastest way by the clock."""
    best: dict[tuple[str, Any], dict[str, Any]] = {}
    for way in ways:
        key = way["sampler"], way["mix_weight"]
        if key not in best or way["seconds"][batch] < best[key]["seconds"][batch]:
            best[key] = way
    return list(best.values())[: _CURVES + 1]


def _rows(figure: Any, report: Mapping[str, Any], batches: Sequence[str]) -> None:
    """One row per way: tokens per forward, speed by the clock, accuracy."""
    ways = list(reversed(report["ways"]))
    places = range(len(ways))
    forward, clock, right = figure.subplots(1, 3, sharey=True)
    forward.errorbar([way["tokens_per_forward"] for way in ways], places,
                     xerr=[way["standard_error"]["tokens_per_forward"] for way in ways], fmt="o", color=_COLOURS[0])  # fmt: skip
    for colour, marker, batch in zip(_COLOURS[1:], "os", dict.fromkeys(batches), strict=False):
        clock.plot([1 / way["ratio_to_ar"][batch] for way in ways], places, marker, color=colour, label=f"batch {batch}")
    clock.axvline(1.0, color="grey", linewidth=0.8)
    last = str(report["k"][-1])
    for colour, marker, (name, k) in zip(_COLOURS[1:], "os", (("pass_at", "1"), ("majority_at", last)), strict=False):
        right.errorbar([way[name][k] for way in ways], places, xerr=[way["standard_error"][name][k] for way in ways], fmt=marker,
                       color=colour, label=f"{name.removesuffix('_at')}@{k}")  # fmt: skip
    forward.set(yticks=list(places), yticklabels=[way["name"] for way in ways], xlim=(0, None),
                xlabel=f"tokens per forward (planner: at batch {report['batch']})")  # fmt: skip
    clock.set(xlabel="speed over ar, by the clock", xlim=(0, None))
    right.set(xlabel=f"right answers, {report['tasks']} tasks, T={report['temperature']:g}")
    for axes in (forward, clock, right):
        axes.grid(alpha=0.3)
    for axes in (clock, right):
        axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, frameon=False)
