"""Seconds of a decode step, by schedule, batch and context.

    seconds(schedule, S, L) = measured(schedule, S) + (L - L0) * S * (a + b * rows(schedule))

`measured` is a table from the calibration at context L0, interpolated linearly between its batches. a and b come from the same
calibration at a longer context: what a cached position costs per sequence, and per row. Times of later steps correct the table
per schedule and per power of two of the batch, relative to the other schedules: a machine that is slower today, for all schedules
alike, changes no choice.

Invariants: the table file is whole or absent. A table that cannot be read is measured again.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ...files import write_json
from ...model.backends import products
from ...model.policy import Policy
from ..machine import describe
from ..schedule import Schedule

_FORMAT = 1
_SHORTEST = 1e-6
"""Seconds; the least that a step is taken to last."""
_FAST, _SLOW = 0.3, 0.03  # least weight of a new step in the speed of all schedules, and in that of one against the others
_TABLE = 8  # steps that the table's entry counts as, beside the steps of its schedule
_OUTLIER = 2.0  # a step this many times off its expectation was interrupted by something else
_STEPS = 5  # to be raised when the engine's steps come to take other times, because tables on disk are void then


def clock(policy: Policy) -> Callable[[], float]:
    """The clock for step times. On a CPU with one torch thread it is the thread's CPU time, which stands still while the
    operating system runs something else. Elsewhere it is the wall clock; a step ends when its tokens are known."""
    if policy.device.type == "cpu" and torch.get_num_threads() == 1:
        return time.thread_time
    return time.perf_counter


def rows(schedule: Schedule) -> int:
    """Rows per sequence of a full step with sizes."""
    if schedule.kind == "ar":
        return 1
    assert schedule.drafts is not None and schedule.block is not None
    if schedule.kind == "two_pass":
        return 1 + 2 * schedule.drafts
    return 1 + schedule.drafts + len(schedule.levels) * schedule.block


@cache
def _shape(schedule: Schedule) -> tuple[str, int]:
    """Label and rows; cached, because each step reads them."""
    return schedule.label, rows(schedule)


_Part = tuple[float, float, float, float]
"""What `_at` needs for a schedule and a batch."""


@dataclass
class _Factor:
    """By how much times differ from the table. Steps are averaged; of three steps only the middle one has a say.

    Attributes:
        value: the factor. times: how many steps were seen. recent: what the last three showed.
    """

    value: float = 1.0
    times: int = 0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=3))

    def take(self, seen: float, before: int, least: float) -> None:
        """Move towards what a step showed.

        Args:
            before: as how many steps the value from before the first step counts; below 0, steps to begin with that count as one.
            least: weight of the step.
        """
        self.times += 1
        self.recent.append(min(max(seen, self.value / _OUTLIER), self.value * _OUTLIER))
        middle = sorted(self.recent)[(len(self.recent) - 1) // 2]
        self.value *= (middle / self.value) ** max(least, 1 / max(before + self.times, 1))


@dataclass
class StepCosts:
    """The table of step times, and its corrections by later steps.

    Attributes:
        seconds_at: by schedule label and batch, at context `context`.
        per_position, per_row: a and b of the formula, seconds.
    """

    seconds_at: dict[str, dict[int, float]]
    context: int
    per_position: float = 0.0
    per_row: float = 0.0
    _all: _Factor = field(default_factory=_Factor)
    _own: dict[tuple[str, int], _Factor] = field(default_factory=dict)
    _lines: dict[str, list[tuple[int, float]]] = field(init=False)
    _schedules: Sequence[Schedule] = field(init=False, default=())
    _places: dict[str, int] = field(init=False, default_factory=dict)
    _parts: dict[int, list[_Part]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._lines = {label: sorted(known.items()) for label, known in self.seconds_at.items()}

    def seconds(self, schedule: Schedule, batch: int, context: float) -> float:
        """Expected seconds of a step of `batch` sequences with `context` cached positions each."""
        return _at(self._part(schedule, batch), (context - self.context) * batch)

    def each(self, schedules: Sequence[Schedule], batch: int, context: float) -> list[float]:
        """`seconds` of each schedule; quick where they are asked for again for the same object `schedules`."""
        if self._schedules is not schedules:
            self._schedules, self._parts = schedules, {}
            self._places = {schedule.label: n for n, schedule in enumerate(schedules)}
        parts = self._parts.get(batch)
        if parts is None:
            parts = self._parts[batch] = [self._part(schedule, batch) for schedule in schedules]
        longer = (context - self.context) * batch
        return [_at(part, longer) for part in parts]

    def note(self, schedule: Schedule, batch: int, context: float, seconds: float) -> None:
        """Correct the table by the time of one step."""
        label, size = _shape(schedule)[0], batch.bit_length()
        n, parts = self._places.get(label), self._parts.get(batch)
        part = self._part(schedule, batch) if n is None or parts is None else parts[n]
        speed = seconds / _at(part, (context - self.context) * batch)
        self._all.take(speed, -2, _FAST)
        if self._all.times < 3:  # the speed of the machine comes first: an interrupted step would pass for a slow schedule
            return
        own = self._own.setdefault((label, size), _Factor())
        own.take(own.value * speed / self._all.value, _TABLE, _SLOW)
        if n is not None:
            for other, parts in self._parts.items():
                if other.bit_length() == size:
                    parts[n] = (*parts[n][:3], own.value)

    def _part(self, schedule: Schedule, batch: int) -> _Part:
        """What `_at` needs for this schedule and batch."""
        label, row_count = _shape(schedule)
        line = self._lines[label]
        (_, least), at = line[0], line[0][1]
        if len(line) > 1:
            # Beyond the measured batches the line through the nearest two continues.
            i = min(max(bisect.bisect_left(line, (batch, 0.0)), 1), len(line) - 1)
            (low, before), (high, after) = line[i - 1], line[i]
            at = before + (after - before) * (batch - low) / (high - low)
        own = self._own.get((label, batch.bit_length()))
        factor = 1.0 if own is None else own.value
        return at, self.per_position + self.per_row * row_count, max(0.25 * least, _SHORTEST), factor

    def covers(self, schedules: Iterable[Schedule], batches: Iterable[int]) -> bool:
        """Whether the table holds all of these."""
        wanted = set(batches)
        return all(wanted <= self.seconds_at.get(schedule.label, {}).keys() for schedule in schedules)

    def save(self, path: Path, what: dict[str, Any]) -> None:
        """Write the table, with `what` it was measured on."""
        write_json(path, {
            "format": _FORMAT, "measured_on": what, "context": self.context, "per_position": self.per_position,
            "per_row": self.per_row, "seconds": self.seconds_at,
        })

    @classmethod
    def load(cls, path: Path) -> StepCosts | None:
        """The table at `path`; None where there is no table, or none that can be read."""
        try:
            found = json.loads(path.read_bytes())
            if found["format"] != _FORMAT:
                return None
            table = {label: {int(batch): float(s) for batch, s in line.items()} for label, line in found["seconds"].items()}
            return cls(table, int(found["context"]), float(found["per_position"]), float(found["per_row"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


def _at(part: _Part, longer: float) -> float:
    """Seconds of a step with so many more cached positions, all sequences together, than the table was measured at."""
    at, per_position, least, own = part
    return max(at + longer * per_position, least) * own


def measured_on(policy: Policy, page_size: int) -> dict[str, Any]:
    """The conditions of a table: device, threads, installed versions, what multiplies matrices, dtype and sizes of the policy.
    Weights do not count."""
    ignored = ("transformers_version", "_name_or_path", "architectures", "dtype")
    sizes = {key: value for key, value in policy.config.to_dict().items() if key not in ignored}
    machine = describe()
    cuda = policy.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(policy.device) if cuda else machine["processor"],
        "torch_threads": machine["torch_threads"],
        "products": products(policy),
        "steps": _STEPS,
        "versions": {name: machine["versions"][name] for name in ("blockroll", "torch")},
        "dtype": str(policy.dtype),
        "page_size": page_size,
        "policy": sizes,
    }


def table_path(what: dict[str, Any], schedules: Iterable[Schedule]) -> Path:
    """Path of the table for these conditions, below $XDG_CACHE_HOME or ~/.cache."""
    key = json.dumps([what, [schedule.label for schedule in schedules]], sort_keys=True, default=str)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "blockroll" / "step_costs" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
