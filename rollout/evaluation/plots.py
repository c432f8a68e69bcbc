"""The figures of `blockroll eval` as one picture: quality against speed, pass@k, and how far drafts survive.

Invariants: made from the JSON alone.
"""

from __future__ import annotations

import os
from typing import Any

from ...files import whole_file


def plot(figures: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a PNG, whole or not at all. Bars are two standard errors long, one to each side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.6), layout="constrained")
    speed, pass_at, slots = figure.subplots(1, 3)
    temperature = figures["temperatures"][0]
    figure.suptitle(f"{figures['policy']}: {figures['tasks']} held-out tasks, {figures['samples']} sample(s) each,"
                    f" fused {{{','.join(map(str, figures['levels']))}}}, seed {figures['seed']}", fontsize=10)  # fmt: skip
    _speed(speed, figures)
    for name, row in figures["pass_at"].items():
        errors = [figures["standard_error"]["pass_at"][name][k] for k in row]
        pass_at.errorbar([int(k) for k in row], list(row.values()), errors, marker=".", label=name)
    pass_at.set(xscale="log", xlabel="k", ylabel=f"pass@k, T={temperature:g}", xticks=figures["k"], xticklabels=figures["k"])
    pass_at.minorticks_off()
    for size, row in figures.get("acceptance_by_slot", {}).items():
        slots.plot(range(1, len(row) + 1), row, marker=".", label=f"block size {size}, same places")
    for way in figures["ways"]:
        if way["name"] == figures.get("drafting") and way["temperature"] == temperature and way["policy"] != "parent":
            slots.plot(range(1, len(way["acceptance"]) + 1), way["acceptance"], linestyle=":", marker="x", markersize=4,
                       label=f"block size {way['block_size']}, k-th draft of a {way['name']} step")  # fmt: skip
    slots.set(xlabel="slot", ylabel=f"accepted, given all before it were, T={temperature:g}", ylim=(0, 1))
    for axes in (speed, pass_at, slots):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _speed(axes: Any, figures: dict[str, Any]) -> None:
    """Right answers against tokens per forward, one point for each way at the policy's own block size."""
    temperatures = figures["temperatures"]
    names: list[str] = []
    for way in figures["ways"]:
        if way["block_size"] != figures["block_size"]:
            continue
        name = "parent" if way["policy"] == "parent" else way["name"]
        if name not in names:
            names.append(name)
        first = way["temperature"] == temperatures[0]
        axes.errorbar(
            way["tokens_per_forward"], way["pass_at_1"], way["standard_error"], way["tokens_per_forward_standard_error"],
            marker="osD^v*"[temperatures.index(way["temperature"]) % 6], color=f"C{names.index(name)}",
            fillstyle="full" if first else "none", label=f"{name}, T={way['temperature']:g}",
        )  # fmt: skip
    axes.set(xlabel="tokens per forward", ylabel="pass@1")
