"""The files of a run, read from where the last read ended.

Invariants:
- A last line without its end is left for the next read: its writer is still at it.
- A file that became shorter was replaced or rewritten, and is read from its start.
- Memory holds the newest `most` samples, and counts of all of them.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ConfigError, DataError
from ...inputs import MAX_LINE, json_object, open_input, read_input, read_lines, unreadable
from ...yaml_reader import MAX_FILE, read_yaml
from ..sample_lines import CONFIG, METRICS, ROLLOUTS
from .origins import ACCEPTED
from .samples import Encode, InspectedSample, samples_of

MAX_STEPS = 100_000
"""Lines of metrics that are kept; the newest."""


@dataclass
class Totals:
    """Counts over all samples of a run, also over those that are not kept."""

    trajectories: int = 0
    tokens: int = 0
    forwards: int = 0
    accepted: int = 0

    def add(self, sample: InspectedSample) -> None:
        """Count one more."""
        self.trajectories += 1
        self.tokens += len(sample.tokens)
        self.forwards += sample.forwards or 0
        self.accepted += int((sample.origin == ACCEPTED).sum())


@dataclass
class _Growing:
    """A file of JSON lines that may grow."""

    path: Path
    offset: int = 0
    lines: int = 0
    file: tuple[int, int] | None = None

    def restarted(self) -> bool:
        """Whether the file is another one than at the last read, or shorter. Then reading begins at its start."""
        try:
            found = os.stat(self.path)
        except OSError as error:
            raise unreadable(self.path, error) from error
        same = self.file in (None, (found.st_dev, found.st_ino)) and found.st_size >= self.offset
        self.file = found.st_dev, found.st_ino
        if not same:
            self.offset = self.lines = 0
        return not same

    def read(self) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """(number, place, object) of every whole line that was added."""
        name = os.fspath(self.path)
        try:
            file = open_input(self.path)
        except OSError as error:
            raise unreadable(self.path, error) from error
        with file:
            file.seek(self.offset)
            for _, raw in read_lines(file, name, MAX_LINE):
                ended = raw.endswith(b"\n")
                place = f"{name} line {self.lines + 1}"
                try:
                    record = json_object(raw, place) if raw.strip() else None
                except DataError:
                    if ended:
                        raise
                    return
                self.offset, self.lines = self.offset + len(raw), self.lines + 1
                if record is not None:
                    yield self.lines, place, record


@dataclass
class Run:
    """What is known of a run so far.

    Attributes:
        title: what the page calls it.
        samples: the newest, in the order of the file.
        metrics: lines of figures per step; None where the run has no such file.
        policy: the policy that its configuration names; None where there is none.
        most: samples that are kept.
        encode: the tokenizer, for a search's candidates.
    """

    title: str
    rollouts: _Growing
    figures: _Growing | None
    policy: str | None
    most: int
    encode: Encode | None = None
    totals: Totals = field(default_factory=Totals)
    samples: deque[InspectedSample] = field(default_factory=deque)
    metrics: deque[dict[str, Any]] | None = None

    @classmethod
    def find(cls, path: str | os.PathLike[str], most: int, live: bool = False) -> Run:
        """The run at a path: a directory with rollouts.jsonl, or a file like it. Reads nothing yet.

        Args:
            live: a directory may still be without.

        Raises:
            DataError: there is none.
        """
        place = Path(path)
        if not place.is_dir():
            return cls(place.name, _Growing(place), None, None, most, samples=deque(maxlen=most))
        if not live and not (place / ROLLOUTS).exists():
            raise DataError(os.fspath(path), f"is a directory without {ROLLOUTS}",
                            "give a GRPO run's directory (with log_groups of at least 1), or the output of `blockroll generate`")
        title = place.resolve().name
        return cls(title, _Growing(place / ROLLOUTS), _Growing(place / METRICS), _policy_of(place), most,
                   samples=deque(maxlen=most), metrics=deque(maxlen=MAX_STEPS))

    def read(self) -> bool:
        """Reads what was added; returns whether anything was."""
        changed = False
        awaited = self.figures is not None and not self.rollouts.path.exists()
        if not awaited and self.rollouts.restarted():
            self.totals, changed = Totals(), True
            self.samples.clear()
        for number, place, record in () if awaited else self.rollouts.read():
            for sample in samples_of(record, place, number, self.encode):
                self.totals.add(sample)
                self.samples.append(sample)
            changed = True
        if self.figures is not None and self.metrics is not None and self.figures.path.exists():
            if self.figures.restarted():
                self.metrics.clear()
                changed = True
            for _, _, record in self.figures.read():
                self.metrics.append(record)
                changed = True
        return changed


def _policy_of(directory: Path) -> str | None:
    """The policy whose tokenizer the run uses."""
    try:
        config = read_yaml(read_input(directory / CONFIG, MAX_FILE), os.fspath(directory / CONFIG))
    except (OSError, ConfigError):
        return None
    policy = config.get("policy") if isinstance(config, dict) else None
    return policy if isinstance(policy, str) else None
