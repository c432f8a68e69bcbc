"""rollouts.jsonl: the first groups of each step, whole, for `blockroll inspect`.

Invariant: the lines of a step are in the file before its checkpoint is. So a resumed run drops the lines of later steps, and
makes them again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ....files import append_jsonl, whole_file
from ....inputs import open_input
from ....rollout.sample_lines import sample_line
from ....rollout.types import Trajectory


def log_groups(path: Path, step: int, groups: Sequence[tuple[Sequence[Trajectory], np.ndarray]], advantage_GK: np.ndarray,
               tokenizer: Any, prefix: str = "") -> None:
    """Appends the samples of these groups, whole or not at all.

    Args:
        groups: of each the trajectories and their rewards_K. NaN, for a sample without a reward, is null in its line.
        prefix: what the ids of this run begin with; the lines leave it out.
    """
    append_jsonl(path, *(
        sample_line(sample.request_id.removeprefix(prefix), sample, tokenizer,
                    {"step": step, "reward": _number(reward), "advantage": _number(advantage)})
        for (samples, rewards_K), advantage_K in zip(groups, advantage_GK, strict=True)
        for sample, reward, advantage in zip(samples, rewards_K, advantage_K, strict=True)
    ))  # fmt: skip


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def drop_later(path: Path, step: int) -> None:
    """Removes the lines of steps after `step`, and a last line that a kill has cut short."""
    if not path.exists():
        return
    with open_input(path) as lines, whole_file(path) as temporary, open(temporary, "wb") as kept:
        for line in lines:
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                kept.write(line)
