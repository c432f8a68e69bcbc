"""The report of `blockroll tradeoff` as a picture, and what both say of it in words.

Invariants: made from the report alone. Tokens per forward never stand without the clock and the accuracy beside them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from ..plot_style import BLACK, COLOURS, GREY, head, picture, series

_CURVES = 6
"""Ways that have curves; all are in the lower row."""
_MARKS = 4
"""Batches that are shown in one row of the lower panels; of more, the first and the last."""
_ROW, _LEGEND_ROWS = 0.27, 2
"""Inches of a row of the lower panels, and rows that are free for a legend."""


def reach(reference: Mapping[str, Any], way: Mapping[str, Any], ratio: float) -> list[dict[str, float | None]]:
    """For each of the reference's majority@k: the accuracy, and the seconds in which the way reaches it over those of the
    reference. Between two k the way's accuracy is interpolated. None: not reached with as many samples as were drawn.

    Args: ratio: the way's seconds of a sample over those of the reference.
    """
    ks = sorted(map(int, way["majority_at"]))
    curve = [(0.0, 0.0), *((k, way["majority_at"][str(k)]) for k in ks)]
    found: list[dict[str, float | None]] = []
    for k in ks:
        wanted = reference["majority_at"][str(k)]
        needed = _least(curve, wanted)
        # One sample is the least there is.
        found.append({"k": k, "accuracy": wanted, "ratio": None if needed is None else max(needed, 1.0) * ratio / k})
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
    ways, batches = report["ways"], [str(batch) for batch in report["batches"]]
    detail = (f"{report['policy']}: {report['tasks']} held-out tasks, {report['samples']} samples of each at "
              f"T={report['temperature']:g}, block size {report['block_size']}, {report['dtype']}, "
              f"{report['machine']['processor']}, {report['machine']['device']}, {report['machine']['torch_threads']} thread(s); "
              f"tokens per forward at batch {report['batch']}. Bars: one standard error to each side.")  # fmt: skip
    band = _ROW * (len(ways) + _LEGEND_ROWS)
    with picture(path, 2, 3, 4.6 + band, detail, sharey="row", gridspec_kw={"height_ratios": (2.4, 0.4 + band)}) as axes:
        (first, last, forwards), (drafted, clock, right) = axes
        _curves(first, report, "seconds", f", batch {batches[0]}", lambda way: way["seconds"][batches[0]])
        _curves(last, report, "seconds", f", batch {batches[-1]}", lambda way: way["seconds"][batches[-1]])
        _curves(forwards, report, "forwards", "", lambda way: way["forwards"])
        first.set_ylabel(f"majority@k, k = {', '.join(map(str, report['k']))}")
        handles, labels = first.get_legend_handles_labels()
        first.figure.legend(handles, labels, loc="outside upper left", ncols=4)
        _tokens_per_forward(drafted, ways)
        _speed(clock, ways, batches if len(batches) <= _MARKS else [batches[0], batches[-1]])
        _right(right, report)


def _shown(ways: Sequence[dict[str, Any]], batch: str) -> list[dict[str, Any]]:
    """`ar`, and of each sampler and weight the fastest way by the clock."""
    best: dict[tuple[str, Any], dict[str, Any]] = {}
    for way in ways:
        key = way["sampler"], way["mix_weight"]
        if key not in best or way["seconds"][batch] < best[key]["seconds"][batch]:
            best[key] = way
    return list(best.values())[: _CURVES + 1]


def _curves(axes: Any, report: Mapping[str, Any], unit: str, at: str, cost: Callable[[Mapping[str, Any]], float]) -> None:
    """Accuracy against what k samples of a question cost, in a unit at a batch."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    shown = _shown(report["ways"], str(report["batches"][0]))
    for i, way in enumerate(shown):
        costs = [int(k) * cost(way) for k in way["majority_at"]]
        errors = list(way["standard_error"]["majority_at"].values())
        axes.errorbar(costs, list(way["majority_at"].values()), errors, label=way["name"], elinewidth=1.0, **_style(i))
    reference, *others = shown
    least = min(others, key=cost, default=reference)
    finding = f"{least['name']}: {cost(least) / cost(reference):.2f} of ar's {unit}{at}" if others else f"ar alone, {unit}{at}"
    head(axes, finding, "majority vote of k samples", width=31)
    axes.set(xscale="log", xlabel=f"{unit} per question{at}")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _style(i: int) -> dict[str, Any]:
    """Black is `ar`."""
    colours = (BLACK, *(colour for colour in COLOURS if colour != BLACK))
    return series(i) | {"color": colours[i % len(colours)]}


def _places(axes: Any, ways: Sequence[Mapping[str, Any]]) -> list[int]:
    """One row per way, the first at the top, and free rows for a legend below the last."""
    axes.set(yticks=range(len(ways)), yticklabels=[way["name"] for way in reversed(ways)],
             ylim=(-0.6 - _LEGEND_ROWS, len(ways) - 0.4))  # fmt: skip
    return list(reversed(range(len(ways))))


def _aside(places: Sequence[int], i: int, count: int) -> list[float]:
    """Marks of one row stand below each other, so that none hides another."""
    return [place + 0.5 * ((count - 1) / 2 - i) / max(count - 1, 1) for place in places]


def _tokens_per_forward(axes: Any, ways: Sequence[Mapping[str, Any]]) -> None:
    values = [way["tokens_per_forward"] for way in ways]
    errors = [way["standard_error"]["tokens_per_forward"] for way in ways]
    axes.errorbar(values, _places(axes, ways), xerr=errors, fmt="o", color=BLACK)
    most = max(ways, key=lambda way: way["tokens_per_forward"])
    head(axes, f"{most['name']}: {most['tokens_per_forward']:.1f} tokens per forward", "tokens over forward passes", width=31)
    axes.set(xlabel="tokens per forward", xlim=(0, 1.08 * max(values)))


def _speed(axes: Any, ways: Sequence[Mapping[str, Any]], batches: Sequence[str]) -> None:
    places = _places(axes, ways)
    for i, batch in enumerate(batches):
        axes.plot([1 / way["ratio_to_ar"][batch] for way in ways], _aside(places, i, len(batches)), label=f"batch {batch}",
                  **series(i) | {"linestyle": "none"})  # fmt: skip
    axes.plot([1.0, 1.0], [-0.5, len(ways) - 0.5], "-", color=GREY, linewidth=1.0, zorder=1)
    fastest = min(ways, key=lambda way: way["ratio_to_ar"][batches[0]])
    ends = dict.fromkeys((batches[0], batches[-1]))
    figures = ", ".join(f"{1 / fastest['ratio_to_ar'][batch]:.1f}x at batch {batch}" for batch in ends)
    head(axes, f"{fastest['name']}: {figures}", "speed over ar, by the clock", width=31)
    axes.set(xlabel="speed over ar (grey line: as fast)")
    axes.set_xlim(0, None)
    axes.legend(loc="lower center", ncols=2, columnspacing=1.0, handletextpad=0.2)


def _right(axes: Any, report: Mapping[str, Any]) -> None:
    ways, last = report["ways"], str(report["k"][-1])
    places = _places(axes, ways)
    shares = list(dict.fromkeys((("pass_at", "1"), ("majority_at", last), ("pass_at", last))))
    for i, (name, k) in enumerate(shares):
        axes.errorbar([way[name][k] for way in ways], _aside(places, i, len(shares)),
                      xerr=[way["standard_error"][name][k] for way in ways], label=f"{name.removesuffix('_at')}@{k}",
                      **series(i) | {"linestyle": "none"})  # fmt: skip
    reference = ways[0]
    worst = min(ways, key=lambda way: way["pass_at"]["1"])
    points = 100 * (worst["pass_at"]["1"] - reference["pass_at"]["1"])
    finding = "No way has a lower pass@1 than ar" if worst is reference else f"{worst['name']}: {points:+.1f} points of pass@1"
    head(axes, finding, "right answers, against ar's pass@1" if len(ways) > 1 else "right answers", width=31)
    axes.set(xlabel="right answers")
    axes.legend(loc="lower center", ncols=2, columnspacing=1.0, handletextpad=0.2)
