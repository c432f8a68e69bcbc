"""Bounds of the figures, in `bounds.json`: by Triton version, target, kernel and variant, the figures that must not get worse.

Invariants:
- A bound is the worst figure of the variant's cases when it was entered, and only tightens (`tighten.py`).
- Compilers differ, so each minor version of Triton has its own bounds. A version without any takes, figure by figure, the
  loosest of the other versions.
- Every launch has bounds: a kernel or variant that the file does not know is an excess.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path

from .figures import MORE_IS_BETTER, Figures

PATH = Path(__file__).with_name("bounds.json")

Bounds = Mapping[str, float]
"""By name of a figure."""
Entries = dict[str, Bounds]
"""By `key`."""

REMEDY = "python -m blockroll.kernels.isa.tighten"


@cache
def registered() -> dict[str, Entries]:
    """The file: entries by minor version of Triton."""
    found: dict[str, Entries] = json.loads(PATH.read_text())
    return found


def minor(triton_version: str) -> str:
    """`3.7` of `3.7.1`."""
    return ".".join(triton_version.split(".")[:2])


def key(target: str, kernel: str, variant: str) -> str:
    return " ".join(filter(None, (target, kernel, variant)))


def worse(figure: str, value: float, bound: float) -> bool:
    """Whether a figure lies on the wrong side of its bound."""
    return value < bound if figure in MORE_IS_BETTER else value > bound


def loosest(known: Mapping[str, Entries], name: str) -> Bounds | None:
    """The loosest bounds of one entry over all versions; None where no version has any."""
    found = [entries[name] for entries in known.values() if name in entries]
    if not found:
        return None
    return {each: (min if each in MORE_IS_BETTER else max)(bounds[each] for bounds in found) for each in found[0]}


def excesses(triton_version: str, name: str, figures: Figures) -> list[str]:
    """What is worse than its bound, each as `figure value, bound bound`. Args: name: of `key`."""
    known, version = registered(), minor(triton_version)
    bounds = known[version].get(name) if version in known else loosest(known, name)
    if bounds is None:
        return [f"no bounds for {name!r} under Triton {version}; enter them with {REMEDY}"]
    return [
        f"{figure} {value:g}, bound {bounds[figure]:g}"
        for figure, value in asdict(figures).items() if worse(figure, value, bounds[figure])
    ]  # fmt: skip
