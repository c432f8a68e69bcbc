"""What `blockroll plan` prints of its result: a conclusion, a table of ratios, and on request everything.

Invariants: made from the result alone, which is what the JSON holds.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ..wording import kibi, nearest, span

_WORDS = ("schedule", "device", "best", "rates from", "context")


def conclusion(result: Mapping[str, Any]) -> str:
    """One line: for the shortest context and a batch near 16, what pays on each device, and how much."""
    cases = result["devices"][0]["predicted"] if result["devices"] else []
    if not cases:
        return "no devices"
    batch, context = nearest(case["batch"] for case in cases), min(case["context"] for case in cases)
    parts = []
    for device in result["devices"]:
        (case,) = [c for c in device["predicted"] if (c["batch"], c["context"]) == (batch, context)]
        parts.append(f"{device['name']} {_pays(case)}x ar")
    return f"batch {batch}, context {kibi(context)}: {'; '.join(parts)}"


def show(result: Mapping[str, Any], everything: bool) -> None:
    """Print it.

    Args:
        everything: also bytes and FLOPs of a step, where attention becomes compute-bound, and times with their schedules.
    """
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(f"{conclusion(result)}\n", highlight=False, soft_wrap=True)
    model, first = result["model"], ", ".join(f"{chance:.2f}" for chance in result["survival"][:4])
    console.print(
        f"{model['name']}: {model['parameters'] / 1e9:.3g}B parameters, {model['weight_bytes'] / 1e9:.3g} GB in bfloat16,"
        f" {model['kv_bytes_per_token'] / 1024:.3g} KiB of keys and values per token, blocks of {model['block_size']}.\n"
        "Each entry: the kind of schedule with the most tokens/s, and its tokens/s over those of ar (x ar), predicted. Two\n"
        "kinds, or two ends, are by the data sheet's peak rates and by rates that kernels reach.\n"
        f"P(at least k drafts accepted), k = 1, 2, ..: {first}, ..\n",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    batches = list(dict.fromkeys(case["batch"] for device in result["devices"] for case in device["predicted"]))
    rows = []
    for device in result["devices"]:
        for context in dict.fromkeys(case["context"] for case in device["predicted"]):
            cases = {case["batch"]: case for case in device["predicted"] if case["context"] == context}
            rows.append((device["name"], kibi(context), *(_pays(cases[batch]) for batch in batches)))
    _print(console, "", ("device", "context", *(f"batch {batch}" for batch in batches)), rows)
    if everything:
        _show_all(console, result)
    else:
        console.print("--all: bytes and FLOPs of a step, milliseconds, whole schedules, where rates are from", highlight=False)


def _pays(case: Mapping[str, Any]) -> str:
    kinds = dict.fromkeys(case[side]["best"]["schedule"].partition("(")[0] for side in ("peak", "reached"))
    return f"{'/'.join(kinds)} {span(case[side]['best']['ratio'] for side in ('peak', 'reached'))}"


def _show_all(console: Console, result: Mapping[str, Any]) -> None:
    _print(
        console, "A decode step: bytes moved and FLOPs, whatever the device",
        ("batch", "context", "schedule", "rows", "experts", "GB", "TFLOP"),
        [
            (str(r["batch"]), str(r["context"]), r["schedule"], str(r["rows"]), f"{r['experts_touched']:.1f}",
             f"{r['bytes'] / 1e9:.2f}", f"{r['flops'] / 1e12:.3f}")
            for r in result["steps"]
        ],
    )  # fmt: skip
    _print(
        console, "Rows per sequence until attention is compute-bound over a long context (verify rows, proposals of one block)",
        ("device", "by peaks", "proposals", "by rates reached", "proposals", "rates from"),
        [
            (d["name"], f"{d['attention_compute_bound']['peak']['rows']:.0f}",
             f"{d['attention_compute_bound']['peak']['proposals']:.1f}",
             f"{d['attention_compute_bound']['reached']['rows']:.0f}",
             f"{d['attention_compute_bound']['reached']['proposals']:.1f}", f"{d['source']}; reached: {d['basis']}")
            for d in result["devices"]
        ],
    )  # fmt: skip
    rows = []
    for device in result["devices"]:
        for case in device["predicted"]:
            row = [device["name"], str(case["batch"]), str(case["context"])]
            for name in ("peak", "reached"):
                side = case[name]
                row += [f"{side['ar_seconds'] * 1e3:.2f}", side["best"]["schedule"],
                        f"{side['best']['seconds'] * 1e3:.2f}", f"{side['best']['ratio']:.2f}"]  # fmt: skip
            rows.append(row)
    _print(
        console, "Milliseconds of an ar step, the best schedule, its milliseconds, x ar; left by peaks, right by rates reached",
        ("device", "batch", "context", "ar ms", "best", "ms", "x ar", "ar ms", "best", "ms", "x ar"), rows,
    )  # fmt: skip


def _print(console: Console, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in _WORDS else "right", no_wrap=heading != "rates from")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print()
