"""The figures of `blockroll eval` as one picture: quality against speed, pass@k, and how far drafts survive.

Invariants: made from the JSON alone. Bars are two standard errors long, one to each side.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from ..plot_style import GREY, head, picture, series
from .card import largest_gap

LEAST_SURVIVAL = 0.02
"""Drafts that fewer steps reach are left out: their acceptance is noise."""


def plot(figures: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a PNG, whole or not at all."""
    temperature, slots = figures["temperatures"][0], figures.get("acceptance_by_slot", {})
    names = list(dict.fromkeys(_name(way) for way in figures["ways"]))
    levels = ",".join(map(str, figures["levels"]))
    detail = (f"{figures['policy']}: {figures['tasks']} held-out tasks, {figures['samples']} sample(s) of each at"
              f" T={temperature:g} and one elsewhere, fused {{{levels}}} but for ar, block size {figures['block_size']}, seed"
              f" {figures['seed']}. Bars: one standard error to each side.")  # fmt: skip
    with picture(path, 2 if slots else 1, 2, 6.6 if slots else 3.6, detail) as axes:
        _speed(axes[0][0], figures, names)
        _pass_at(axes[0][1], figures, names)
        if slots:
            _slots(axes[1][0], figures)
            _drafts(axes[1][1], figures)


def _name(way: dict[str, Any]) -> str:
    return "parent" if way["policy"] == "parent" else way["name"]


def _speed(axes: Any, figures: dict[str, Any], names: list[str]) -> None:
    """Right answers against tokens per forward, one point for each way at the policy's own block size."""
    temperatures = figures["temperatures"]
    ways = [way for way in figures["ways"] if way["block_size"] == figures["block_size"]]
    for way in ways:
        name, first = _name(way), way["temperature"] == temperatures[0]
        style = series(names.index(name)) | {"linestyle": "none", "fillstyle": "full" if first else "none"}
        errors = way["standard_error"], way["tokens_per_forward_standard_error"]
        axes.errorbar(way["tokens_per_forward"], way["pass_at_1"], *errors, **style)
    for name in dict.fromkeys(map(_name, ways)):
        axes.plot([], [], label=name, **series(names.index(name)) | {"linestyle": "none"})
    for temperature in temperatures if len(temperatures) > 1 else ():
        fill = "full" if temperature == temperatures[0] else "none"
        axes.plot([], [], "o", color=GREY, fillstyle=fill, label=f"T={temperature:g}")
    fast = max((way for way in ways if way["temperature"] == temperatures[0] and way["sampler"] in ("lossless", "coupled", "ar")),
               key=lambda way: way["tokens_per_forward"])  # fmt: skip
    ar = next(way for way in ways if _name(way) == "ar" and way["temperature"] == temperatures[0])
    finding = (f"{fast['name']}: {fast['tokens_per_forward']:.1f} tokens per forward,\n{100 * fast['pass_at_1']:.0f} % right (ar:"
               f" {100 * ar['pass_at_1']:.0f} %)")  # fmt: skip
    head(axes, finding, "right answers (pass@1) against tokens per forward")
    axes.set(xlabel="tokens per forward", ylabel="pass@1")
    axes.set_xlim(0, 1.08 * max(way["tokens_per_forward"] for way in ways))
    axes.set_ylim(0, 1.02)
    axes.legend(loc="lower center", ncols=2)


def _pass_at(axes: Any, figures: dict[str, Any], names: list[str]) -> None:
    """Series that nearly coincide are moved aside by a few percent of k, so that none hides another."""
    table, k = figures["pass_at"], figures["k"]
    for i, (name, row) in enumerate(table.items()):
        errors = [figures["standard_error"]["pass_at"][name][of] for of in row]
        aside = 1 + 0.05 * (i - (len(table) - 1) / 2)
        axes.errorbar([int(of) * aside for of in row], list(row.values()), errors, label=name, **series(names.index(name)))
    most = str(max(k))
    best = max(table, key=lambda name: table[name][most])
    finding = f"{best}: one of {most} samples is right for {100 * table[best][most]:.0f} % of the tasks"
    head(axes, finding, f"pass@k, T={figures['temperatures'][0]:g}; points are moved aside a little")
    axes.set(xscale="log", xlabel="k", ylabel="pass@k", xticks=k, xticklabels=k)
    axes.minorticks_off()
    axes.legend(loc="lower right")


def _slots(axes: Any, figures: dict[str, Any]) -> None:
    """The largest block as a line, the others as marks beside its points."""
    table = figures["acceptance_by_slot"]
    sizes = sorted(table, key=int, reverse=True)
    for i, size in enumerate(sizes):
        row, errors = table[size], figures["standard_error"]["acceptance_by_slot"][size]
        style = series(i) | ({"linestyle": "none"} if i else {})
        slots = np.arange(1, len(row) + 1) + 0.22 * i
        axes.errorbar(slots, row, errors, label=f"block size {size}", **style | {"markersize": 3.5})
    gap, small, large, slot = largest_gap(table)
    finding = f"Block sizes differ by at most {100 * gap:.1f} % at a slot" if gap < 0.05 else \
        f"Block sizes {small} and {large} differ by {100 * gap:.0f} % at slot {slot}"  # fmt: skip
    alone = f"A block of {large}: from {table[large][0]:.2f} at its first slot to {table[large][-1]:.2f}"
    head(axes, finding if len(table) > 1 else alone, "drafts accepted by slot, given all before were, at the same places")
    axes.set(xlabel="slot of the mask block", ylabel="accepted", ylim=(0, 1.02))
    axes.legend(loc="lower left")


def _drafts(axes: Any, figures: dict[str, Any]) -> None:
    ways = sorted((way for way in figures["ways"] if way["name"] == figures.get("drafting")
                   and way["temperature"] == figures["temperatures"][0] and way["policy"] != "parent"),
                  key=lambda way: way["block_size"], reverse=True)  # fmt: skip
    for i, way in enumerate(ways):
        reached = [1.0, *way["survival"]]
        shown = [value for value, share in zip(way["acceptance"], reached, strict=False) if share >= LEAST_SURVIVAL]
        steps = way["tasks"] * way["samples"] * way["answer_tokens"] / max(way["tokens_per_step"], 1e-9)
        errors = [np.sqrt(value * (1 - value) / max(steps * share, 1)) for value, share in zip(shown, reached, strict=False)]
        axes.errorbar(range(1, len(shown) + 1), shown, errors, label=f"block size {way['block_size']}:"
                      f" {way['tokens_per_forward']:.2f} tokens per forward", **series(i))  # fmt: skip
    best = max(ways, key=lambda way: way["tokens_per_forward"])
    head(axes, f"Block size {best['block_size']} gives the most: {best['tokens_per_forward']:.1f} tokens per forward",
         f"k-th draft of a {best['name']} step, where at least {100 * LEAST_SURVIVAL:g} % of steps come that far")
    axes.set(xlabel="k", ylabel="accepted, given all before were", ylim=(0, 1.02))
    axes.legend(loc="lower left")
