"""Predictions registered before measuring: `predictions.json` holds, by device, milliseconds and share of the roofline of every
kernel and step that `bench gpu` measures. `plan` shows the same numbers. `python -m blockroll.rollout.bench.gpu.predict` writes
the file; its commit is the registration.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from .roofline import HARDWARE

PATH = Path(__file__).with_name("predictions.json")


@cache
def registered() -> dict[str, Any]:
    """The file: `policy`, `rule`, and `devices`, each with `assumed`, `kernels` and `steps`, whose `parts_ms` are kernels'."""
    found: dict[str, Any] = json.loads(PATH.read_text())
    return found


def device_in(title: str) -> str | None:
    """The key in `HARDWARE` of a device's own name; None for other hardware."""
    return next((name for name in HARDWARE if name in title.lower()), None)


def predicted(title: str) -> Mapping[str, Any]:
    """{"kernels", "steps"} of the device of this name: rows by item name. Empty for other hardware."""
    found: Mapping[str, Any] = registered()["devices"].get(device_in(title) or "", {})
    return found


def step_seconds(device: str, schedule: str, batch: int, context: int) -> float | None:
    """The registered prediction of a step; None where there is none."""
    row = registered()["devices"].get(device, {}).get("steps", {}).get(f"{schedule} {batch} at {context}")
    return None if row is None else row["ms"] / 1e3
