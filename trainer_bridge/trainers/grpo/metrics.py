"""metrics.jsonl, which has a line per step, and the summary of it. Step 0 holds the measurements before training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ....files import write_atomic
from ....rollout.sample_lines import METRICS as METRICS
from .config import GrpoConfig

SPAN = 10
"""Steps at either end of a run whose rewards the summary compares."""

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The lines of a run; [] without a file. A last line that a kill has cut short is left out."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Replace the file by these lines."""
    write_atomic(path, b"".join(json.dumps(row).encode() + b"\n" for row in rows))


def mean_reward(rows: Sequence[Row]) -> tuple[float, float]:
    """Mean of the steps' mean rewards, and its standard error (0 for a single step)."""
    values = np.array([row["reward"] for row in rows])
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def summary(config: GrpoConfig, rows: Sequence[Row], gateway: Mapping[str, Any], seconds: float) -> Row:
    """The summary of a run.

    Args:
        gateway: its figures, which count over the whole life of the ledger.
        seconds: of this process; a run that was resumed took longer.
    """
    before, after = rows[0], rows[-1]
    trained = [row for row in rows if row["step"]]
    tokens, forwards = (sum(row[key] for row in trained) for key in ("tokens", "forwards"))
    found: Row = {}
    for name in ("accuracy", "greedy"):
        for when, row in (("before", before), ("after", after)):
            found[f"heldout_{name}_{when}"] = row[f"heldout_{name}"]
            found[f"heldout_{name}_{when}_standard_error"] = row[f"heldout_{name}_standard_error"]
            found[f"heldout_{name}_tokens_{when}"] = row[f"heldout_{name}_tokens"]
    for when, some in (("first", trained[:SPAN]), ("last", trained[-SPAN:])):
        found[f"reward_{when}_{SPAN}"], found[f"reward_{when}_{SPAN}_standard_error"] = mean_reward(some)
    return {
        **found,
        "heldout_tasks": after["heldout_tasks"],
        "sampler": config.rollouts.sampler,
        "engines": gateway.get("engine.engines", gateway.get("engine.actors", 0)),
        "steps": config.steps,
        "final_weight_version": gateway["version"],
        "trajectories": {key: gateway[key] for key in ("requested", "unique", "duplicates", "missing")},
        "unrewarded": sum(row["unrewarded"] for row in trained),
        "groups": sum(row["groups"] for row in trained),
        "groups_used": sum(row["groups_used"] for row in trained),
        "tokens_per_forward": tokens / max(forwards, 1),
        "rollout_tokens_per_s": tokens / sum(row["tokens"] / row["tokens_per_s"] for row in trained),
        "seed": config.seed,
        "seconds": seconds,
    }
