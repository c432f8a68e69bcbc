"""Figures of a run's steps as curves: which of them, in what order, and what they are called."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

KNOWN = {
    "reward": ("Mean reward", ""),
    "heldout_accuracy": ("Held-out accuracy, training temperature", ""),
    "heldout_greedy": ("Held-out accuracy, greedy", ""),
    "tokens_per_forward": ("Tokens per forward", ""),
    "answer_tokens": ("Answer length", "tokens"),
    "entropy": ("Mean of -log p", "nats per token"),
    "tokens_per_s": ("Rollout speed", "tokens/s"),
    "staleness": ("Staleness", "versions"),
    "groups_used": ("Groups with differing rewards", "groups"),
    "seconds.rollout": ("Rollout", "s"),
    "seconds.train": ("Update", "s"),
    "seconds.push": ("Weight push", "s"),
}
"""Curves that come first, with title and unit. Others follow under the name of their field."""
MAX_CURVES = 60
_HIDDEN = {"step", "weight_version"}


def curves(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of every number that rows with a `step` have: its name, title, unit, steps and values. A later row of a step counts."""
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        step = row.get("step")
        if step is None or not _is_number(step):
            continue
        for name, value in _numbers(row):
            found.setdefault(name, {})[step] = value
    order = [*(name for name in KNOWN if name in found), *sorted(name for name in found if name not in KNOWN)]
    return [
        {"name": name, "title": KNOWN.get(name, (name.replace("_", " "), ""))[0], "unit": KNOWN.get(name, ("", ""))[1],
         "known": name in KNOWN, "steps": sorted(found[name]), "values": [found[name][step] for step in sorted(found[name])]}
        for name in order[:MAX_CURVES]
    ]  # fmt: skip


def _numbers(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{part}", number) for part, number in value.items() if _is_number(number))
        elif name not in _HIDDEN and _is_number(value):
            yield name, value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
