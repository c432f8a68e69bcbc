"""`blockroll kernels check`: compile every kernel for every target, print what each uses and the figures of its assembly, and
fail on what is wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ...errors import InvalidInput
from ...files import check_output, write_json
from ...kernels.check import OPS, Report, check
from ...kernels.isa import Figures
from ...kernels.shapes import TARGETS
from ..progress import ItemMeter

MAX_WORKERS = 1024
"""Processes that compile; more than any machine has cores for."""


def check_kernels(
    targets: Sequence[str], ops: Sequence[str], *, quick: bool = False, workers: int = 2, output: Path | None = None
) -> bool:
    """Compile, print the table, and write it to `output` as JSON. Returns whether every launch is clean.

    Args:
        targets, ops: of `TARGETS` and `OPS`; none means all.
        quick: of each kernel and target only the variant with the largest tile.
    Raises:
        InvalidInput: an unknown target or op, kernels that are interpreted, or no Triton.
    """
    for field, given, known in (("target", targets, tuple(TARGETS)), ("op", ops, OPS)):
        for name in given:
            if name not in known:
                raise InvalidInput(field, f"unknown {field} {name!r}", f"use {', '.join(known)}")
    if not 1 <= workers <= MAX_WORKERS:
        raise InvalidInput("workers", f"{workers} is outside 1..{MAX_WORKERS}", "use as many as there are cores")
    if output is not None:
        check_output(output)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise InvalidInput("TRITON_INTERPRET", "kernels are interpreted here, not compiled", "unset the variable")
    try:
        import triton
    except ImportError:
        raise InvalidInput("triton", "is not installed", "pip install 'triton>=3.6'; no accelerator is needed") from None

    console = Console(width=None if sys.stdout.isatty() else 140)
    with ItemMeter("compiled") as meter:
        reports = check(
            targets or tuple(TARGETS), ops or OPS, quick=quick, workers=workers,
            on_report=lambda report, total: meter.advance(f"{report.target} {report.kernel}", total),
        )  # fmt: skip
    console.print(_table(reports))
    console.print(_figures_table(reports))
    faulty = [report for report in reports if report.faults]
    versions = f"triton {triton.__version__}, torch {torch.__version__}"
    for report in faulty:
        console.print(
            f"{report.target} {report.op}.{report.kernel} ({report.shape}, {report.case}): {'; '.join(report.faults)}",
            style="red", markup=False, highlight=False,
        )  # fmt: skip
    console.print(f"{len(reports)} launches, {len(faulty)} with a fault; {versions}", highlight=False)
    if output is not None:
        versions_of = {"triton": triton.__version__, "torch": torch.__version__}
        launches = [asdict(report) for report in reports]
        write_json(output, {"versions": versions_of, "quick": quick, "launches": launches})
    return not faulty


def _table(reports: Sequence[Report]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("target", "kernel", "shape", "case"):
        table.add_column(heading, no_wrap=True)
    for heading in ("warps", "registers", "spills", "stack", "shared", "matrix", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for report in reports:
        numbers = (report.warps, report.registers, report.spills, report.stack, report.shared, report.dots)
        name = f"{report.op}.{report.kernel.strip('_').removesuffix('_kernel')}"
        verdict = "FAULT" if report.faults else "ok"
        table.add_row(report.target, name, report.shape, report.case, *map(str, numbers), verdict)
    return table


def _figures_table(reports: Sequence[Report]) -> Table:
    """The figures of each launch; `kernels/isa/figures.py` says what they are."""
    table = Table(box=None, pad_edge=False)
    for heading in ("target", "kernel", "variant"):
        table.add_column(heading, no_wrap=True)
    names = [field.name for field in fields(Figures)]
    for name in names:
        table.add_column(name.replace("_", "\n"), justify="right", no_wrap=True)
    for report in reports:
        if report.figures is not None:
            values = (f"{getattr(report.figures, name):.3g}" for name in names)
            table.add_row(report.target, report.kernel.strip("_").removesuffix("_kernel"), report.variant, *values)
    return table
